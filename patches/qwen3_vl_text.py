"""Qwen3-VL's language model."""

from hf_longctx import Family

FAMILY = Family(model_type="qwen3_vl_text", multimodal=("qwen3_vl",))
