"""Apertus 8B and 70B."""

from hf_longctx import Family

FAMILY = Family(model_type="apertus")
