"""Hunyuan 0.5B, 1.8B, 4B and 7B. Its q and k norms run after the rotary embedding."""

from hf_longctx import Family

FAMILY = Family(model_type="hunyuan_v1_dense")
