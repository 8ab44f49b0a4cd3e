"""K-EXAONE. Three of four layers have a sliding window."""

from hf_longctx import Family

FAMILY = Family(model_type="exaone_moe", sliding="layer_types")
