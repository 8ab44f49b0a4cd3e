"""Phi-3.5-MoE. Only its masks know of a window."""

from hf_longctx import Family

FAMILY = Family(model_type="phimoe", sliding="all")
