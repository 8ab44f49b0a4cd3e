"""The text model of Aria."""

from hf_longctx import Family

FAMILY = Family(model_type="aria_text")
