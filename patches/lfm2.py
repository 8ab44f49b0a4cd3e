"""LFM2. Most layers are short convolutions, which remember their last few inputs."""

from hf_longctx import Family

FAMILY = Family(model_type="lfm2", sliding="layer_types")
