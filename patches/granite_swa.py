"""Granite with sliding windows and a sink for each head."""

from hf_longctx import Family

FAMILY = Family(model_type="granite_swa", sliding="layer_types", scores={"s_aux": "sinks"})
