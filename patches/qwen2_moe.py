"""Qwen1.5-MoE and Qwen2-57B-A14B. Only its masks know of a window."""

from hf_longctx import Family

FAMILY = Family(model_type="qwen2_moe", sliding="layer_types")
