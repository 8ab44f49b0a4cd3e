"""Jais 2."""

from hf_longctx import Family

FAMILY = Family(model_type="jais2")
