"""A tiny random model, patched for identification, and the documents it is asked about."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from helpers.tiny import config_for, tiny_config
from hf_longctx import patch_model
from hf_longctx.identification.methods.base import HeadProbe
from hf_longctx.tasks import tiny_language
from hf_longctx.tasks.documents import TinyDocuments
from hf_longctx.tasks.haystack import TinyFiller

SINK, RECENT = 2, 24
SHORT = {"steps": 8, "length": 120, "min_length": 60, "facts": 2}  # options of a run that takes a second


def random_model(family: str = "llama", dtype=torch.float32, seed: int = 0, **kwargs):
    """In eval mode, with the vocabulary of the tiny language."""
    torch.manual_seed(seed)
    config = tiny_config(family, **kwargs)
    config.vocab_size = len(tiny_language.VOCAB)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def probe_of(model, seed: int = 0, work: Path | None = None, cls: type = HeadProbe, sink: int = SINK) -> HeadProbe:
    """The model patched with all heads retrieval."""
    patch_model(model, config_for(model, "retrieval", sink, RECENT))
    config = model.config
    return cls(
        model=model,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        documents=TinyDocuments(TinyFiller()),
        seed=seed,
        work=work,
    )
