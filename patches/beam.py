"""Beam 1.0."""

from hf_longctx import Family

FAMILY = Family(model_type="beam", sliding="layer_types")
