"""Helium 1."""

from hf_longctx import Family

FAMILY = Family(model_type="helium")
