"""Command R7B and Command A. Three of four layers have a sliding window; the others have no rotary embedding."""

from hf_longctx import Family

FAMILY = Family(model_type="cohere2", sliding="layer_types")
