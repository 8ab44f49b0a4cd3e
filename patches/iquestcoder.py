"""IQuest-Coder V1. Llama's classes run it."""

from hf_longctx import Family

FAMILY = Family(model_type="iquestcoder")
