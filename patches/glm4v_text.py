"""The language model of GLM-4.1V."""

from hf_longctx import Family

FAMILY = Family(model_type="glm4v_text", multimodal=("glm4v",))
