"""Granite MoE with shared experts."""

from hf_longctx import Family

FAMILY = Family(model_type="granitemoeshared")
