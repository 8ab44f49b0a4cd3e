"""OLMo 3. Three of four layers have a sliding window."""

from hf_longctx import Family

FAMILY = Family(model_type="olmo3", sliding="layer_types")
