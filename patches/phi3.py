"""Phi-3, Phi-3.5-mini, Phi-4 and Phi-4-mini. One projection makes queries, keys and values."""

from hf_longctx import Family

FAMILY = Family(model_type="phi3", key_projection="qkv_proj", sliding="all")
