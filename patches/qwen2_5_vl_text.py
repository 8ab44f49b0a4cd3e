"""Qwen2.5-VL's language model."""

from hf_longctx import Family

FAMILY = Family(model_type="qwen2_5_vl_text", sliding="layer_types", multimodal=("qwen2_5_vl",))
