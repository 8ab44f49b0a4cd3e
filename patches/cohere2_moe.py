"""Command A+. Three of four layers have a sliding window."""

from hf_longctx import Family

FAMILY = Family(model_type="cohere2_moe", sliding="layer_types")
