"""dots.llm1."""

from hf_longctx import Family

FAMILY = Family(model_type="dots1", sliding="layer_types")
