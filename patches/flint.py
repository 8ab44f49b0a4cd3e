"""Flint. Each head has a sink; layers without a sliding window have no rotary embedding."""

from hf_longctx import Family

FAMILY = Family(model_type="flint", sliding="layer_types", scores={"s_aux": "sinks"})
