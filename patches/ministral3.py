"""The text model of Ministral 3 (3B, 8B, 14B). Its queries are scaled by position before the attention."""

from hf_longctx import Family

FAMILY = Family(model_type="ministral3", sliding="all")
