"""SmolLM3 3B. Every fourth layer has no rotary embedding."""

from hf_longctx import Family

FAMILY = Family(model_type="smollm3", sliding="layer_types")
