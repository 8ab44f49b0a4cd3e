"""Code World Model (CWM) 32B."""

from hf_longctx import Family

FAMILY = Family(model_type="cwm", sliding="layer_types")
