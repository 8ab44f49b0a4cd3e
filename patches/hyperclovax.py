"""HyperCLOVA X SEED Think 14B."""

from hf_longctx import Family

FAMILY = Family(model_type="hyperclovax")
