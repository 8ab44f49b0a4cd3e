"""FlexOlmo 7x7B."""

from hf_longctx import Family

FAMILY = Family(model_type="flex_olmo")
