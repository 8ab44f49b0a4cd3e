"""gpt-oss 20B and 120B. Every second layer has a sliding window; each head has a sink."""

from hf_longctx import Family

FAMILY = Family(model_type="gpt_oss", sliding="layer_types", scores={"s_aux": "sinks"})
