"""OLMo Hybrid. Most layers are linear attention."""

from hf_longctx import Family

FAMILY = Family(model_type="olmo_hybrid", sliding="layer_types")
