"""Mellum 2."""

from hf_longctx import Family

FAMILY = Family(model_type="mellum", sliding="layer_types")
