"""InternLM3 8B. Llama's classes run it."""

from hf_longctx import Family

FAMILY = Family(model_type="internlm3")
