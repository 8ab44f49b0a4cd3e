"""StarCoder2 3B, 7B and 15B. All layers have a sliding window."""

from hf_longctx import Family

FAMILY = Family(model_type="starcoder2", sliding="all")
