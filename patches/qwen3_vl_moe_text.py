"""The language model of Qwen3-VL's mixtures of experts."""

from hf_longctx import Family

FAMILY = Family(model_type="qwen3_vl_moe_text", multimodal=("qwen3_vl_moe",))
