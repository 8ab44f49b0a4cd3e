"""Phi-1, Phi-1.5 and Phi-2."""

from hf_longctx import Family

FAMILY = Family(model_type="phi")
