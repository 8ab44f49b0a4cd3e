"""nanochat: its attention is Llama's, with norms of queries and keys after the rotation."""

from hf_longctx import Family

FAMILY = Family(model_type="nanochat")
