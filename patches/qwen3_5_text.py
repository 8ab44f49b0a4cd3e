"""Qwen3.5, and the language model of its multimodal versions. Three of four layers are linear attention."""

from hf_longctx import Family

FAMILY = Family(model_type="qwen3_5_text", sliding="layer_types", multimodal=("qwen3_5",))
