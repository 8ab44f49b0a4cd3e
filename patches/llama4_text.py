"""Llama 4. Layers with chunked attention go on as in Transformers; the others have no RoPE."""

from hf_longctx import Family

FAMILY = Family(model_type="llama4_text", sliding="layer_types")
