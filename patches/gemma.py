"""Gemma 2B and 7B, CodeGemma."""

from hf_longctx import Family

FAMILY = Family(model_type="gemma")
