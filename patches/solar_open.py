"""Solar Open 100B."""

from hf_longctx import Family

FAMILY = Family(model_type="solar_open")
