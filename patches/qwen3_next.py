"""Qwen3-Next. Three of four layers are linear attention, with a state of constant size."""

from hf_longctx import Family

FAMILY = Family(model_type="qwen3_next", sliding="layer_types")
