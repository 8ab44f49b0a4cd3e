"""The language model of GLM-4.5V."""

from hf_longctx import Family

FAMILY = Family(model_type="glm4v_moe_text", multimodal=("glm4v_moe",))
