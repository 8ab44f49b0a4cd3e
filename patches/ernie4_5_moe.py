"""ERNIE 4.5 21B-A3B and 300B-A47B."""

from hf_longctx import Family

FAMILY = Family(model_type="ernie4_5_moe")
