"""Mixtral 8x7B and 8x22B."""

from hf_longctx import Family

FAMILY = Family(model_type="mixtral", sliding="all")
