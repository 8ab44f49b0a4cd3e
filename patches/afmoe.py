"""Trinity. Layers with a sliding window have a rotary embedding, the others none."""

from hf_longctx import Family

FAMILY = Family(model_type="afmoe", sliding="layer_types")
