"""The text model of Apertus 1.5."""

from hf_longctx import Family

FAMILY = Family(model_type="apertus1p5_text")
