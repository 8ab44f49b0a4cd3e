"""Seed-OSS 36B."""

from hf_longctx import Family

FAMILY = Family(model_type="seed_oss")
