"""One record per model family, installed as ``hf_longctx.patches``."""
