"""Qwen3. Its q and k norms run before the rotary embedding, inside Transformers."""

from hf_longctx import Family

FAMILY = Family(model_type="qwen3", sliding="layer_types")
