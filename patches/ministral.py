"""Ministral 8B (2410): most layers have a sliding window."""

from hf_longctx import Family

FAMILY = Family(model_type="ministral", sliding="layer_types")
