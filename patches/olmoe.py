"""OLMoE 1B-7B."""

from hf_longctx import Family

FAMILY = Family(model_type="olmoe")
