"""Mistral 7B and Nemo. v0.1 has a sliding window in every layer, later ones in none."""

from hf_longctx import Family

FAMILY = Family(model_type="mistral", sliding="all", multimodal=("mistral3",))
