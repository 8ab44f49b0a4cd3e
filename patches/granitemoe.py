"""Granite 3.0 and 3.1 MoE."""

from hf_longctx import Family

FAMILY = Family(model_type="granitemoe")
