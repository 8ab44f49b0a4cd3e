"""Granite 3.0 to 3.3, dense."""

from hf_longctx import Family

FAMILY = Family(model_type="granite")
