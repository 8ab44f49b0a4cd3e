"""Ministral 8B (2410)."""

from hf_longctx import Family

FAMILY = Family(model_type="ministral", sliding="layer_types")
