"""Hunyuan A13B."""

from hf_longctx import Family

FAMILY = Family(model_type="hunyuan_v1_moe")
