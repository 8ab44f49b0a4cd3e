"""Llama 2, 3, 3.1, 3.2, 3.3 and what shares their config (Yi, CodeLlama, TinyLlama)."""

from hf_longctx import Family

FAMILY = Family(model_type="llama", multimodal=("llava",))
