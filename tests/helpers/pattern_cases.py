"""Every prefill pattern, by word."""

from __future__ import annotations

import dataclasses

from hf_longctx.config.words import load, words
from hf_longctx.prefill.base import PatternSpec

CLASSES = {word: load("prefill", word) for word in words("prefill")}
RETRIEVAL = {word: cls for word, cls in CLASSES.items() if "retrieval" in cls.roles}


def tight(cls) -> PatternSpec:
    """The spec that reads the least: every number at its lower bound."""
    numbers = {f.name: f.metadata["min"] for f in dataclasses.fields(cls) if "min" in f.metadata}
    return cls(**numbers)
