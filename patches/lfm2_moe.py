"""LFM2's mixtures of experts. Most layers are short convolutions."""

from hf_longctx import Family

FAMILY = Family(model_type="lfm2_moe", sliding="layer_types")
