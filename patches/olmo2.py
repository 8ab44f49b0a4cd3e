"""OLMo 2. Its q and k norms run over all heads together, inside Transformers."""

from hf_longctx import Family

FAMILY = Family(model_type="olmo2")
