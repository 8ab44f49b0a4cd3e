"""Gemma 3 270M and 1B, and the text model of the larger ones. Five of six layers have a sliding window."""

from hf_longctx import Family

FAMILY = Family(model_type="gemma3_text", sliding="layer_types")
