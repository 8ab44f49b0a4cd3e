"""MiniMax-M2."""

from hf_longctx import Family

FAMILY = Family(model_type="minimax_m2")
