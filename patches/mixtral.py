"""Mixtral 8x7B and 8x22B. They have no sliding window, though their config can set one."""

from hf_longctx import Family

FAMILY = Family(model_type="mixtral", sliding="all")
