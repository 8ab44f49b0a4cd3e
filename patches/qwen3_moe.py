"""Qwen3-30B-A3B, Qwen3-235B-A22B and Qwen3-Coder."""

from hf_longctx import Family

FAMILY = Family(model_type="qwen3_moe", sliding="all")
