"""Kolibri 1. Layers with a sliding window have a rotary embedding, the others none."""

from hf_longctx import Family

FAMILY = Family(model_type="kolibri1", sliding="layer_types")
