"""GLM-4-0414 and GLM-Z1."""

from hf_longctx import Family

FAMILY = Family(model_type="glm4")
