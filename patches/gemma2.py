"""Gemma 2. Every second layer has a sliding window; the scores are softcapped."""

from hf_longctx import Family

FAMILY = Family(model_type="gemma2", sliding="layer_types", scores={"softcap": "softcap"})
