"""Command R, Command R+ and Aya 23."""

from hf_longctx import Family

FAMILY = Family(model_type="cohere")
