"""GLM-4.5, GLM-4.5-Air and GLM-4.6."""

from hf_longctx import Family

FAMILY = Family(model_type="glm4_moe")
