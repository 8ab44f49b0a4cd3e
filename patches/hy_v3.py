"""Hunyuan 3 (Hy3)."""

from hf_longctx import Family

FAMILY = Family(model_type="hy_v3")
