"""Qwen2 and Qwen2.5."""

from hf_longctx import Family

FAMILY = Family(model_type="qwen2", sliding="layer_types", multimodal=("internvl",))
