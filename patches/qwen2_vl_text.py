"""Qwen2-VL's language model."""

from hf_longctx import Family

FAMILY = Family(model_type="qwen2_vl_text", sliding="layer_types", multimodal=("qwen2_vl",))
