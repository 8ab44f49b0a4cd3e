"""AFM-4.5B."""

from hf_longctx import Family

FAMILY = Family(model_type="arcee")
