"""Qwen3.5's mixtures of experts. Three of four layers are linear attention."""

from hf_longctx import Family

FAMILY = Family(model_type="qwen3_5_moe_text", sliding="layer_types", multimodal=("qwen3_5_moe",))
