"""OLMo 2: its attention is Llama's, with norms of queries and keys before the rotation."""

from hf_longctx import Family

FAMILY = Family(model_type="olmo2")
