"""Qwen2 and Qwen2.5."""

from hf_longctx.family import Family

FAMILY = Family(model_type="qwen2", sliding="layer_types")
