"""OLMo 1B and 7B."""

from hf_longctx import Family

FAMILY = Family(model_type="olmo")
