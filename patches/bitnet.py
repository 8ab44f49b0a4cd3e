"""BitNet b1.58 2B-4T."""

from hf_longctx import Family

FAMILY = Family(model_type="bitnet")
