"""Persimmon 8B. One projection makes queries, keys and values."""

from hf_longctx import Family

FAMILY = Family(model_type="persimmon", key_projection="query_key_value")
