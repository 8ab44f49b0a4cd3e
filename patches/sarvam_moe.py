"""Sarvam 30B. The classes of GLM-4.5 run it."""

from hf_longctx import Family

FAMILY = Family(model_type="sarvam_moe")
