"""EXAONE 3.0 and 3.5. Llama's classes run it."""

from hf_longctx import Family

FAMILY = Family(model_type="exaone")
