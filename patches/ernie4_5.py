"""ERNIE 4.5 0.3B."""

from hf_longctx import Family

FAMILY = Family(model_type="ernie4_5")
