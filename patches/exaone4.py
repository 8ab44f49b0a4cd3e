"""EXAONE 4.0. In the 32B three of four layers have a sliding window, the others no rotary embedding."""

from hf_longctx import Family

FAMILY = Family(model_type="exaone4", sliding="layer_types")
