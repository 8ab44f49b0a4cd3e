"""``mean_rank``: the mean of the ranks that several methods give to a head."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...config.words import convert, load, spec_word
from ...errors import ConfigError
from .base import HeadProbe, Method, check_scores

FOLDER = "identification.methods"
DEFAULT = ("two_needle", "query_focused", "kvzip")
WORDS = {"folder": FOLDER, "key": "method", "role": None, "instead": None, "bare": True}


@dataclass(frozen=True)
class MeanRank(Method):
    """Mean rank over methods: the Borda count, as Dwork et al. (doi:10.1145/371920.372165) use it on search engines.

    Scores of two methods are on different scales, so what they share are ranks: 1 for the best head, falling evenly;
    heads with equal scores get the mean of their ranks. Heads in layers with a window of the model's own are not
    ranked. It costs what its methods cost together. Where one of them has doubts, so has this one.

    Attributes:
        methods: at least two, each a word, or a mapping of the word (``method``) and its fields.
    """

    paper = "doi:10.1145/371920.372165"
    cases = ({"methods": [{"method": "two_needle", "length": 512}, {"method": "echo_induction", "tokens": 256}]},)

    methods: tuple[Any, ...] = field(
        default_factory=lambda: tuple(load(FOLDER, word)() for word in DEFAULT), metadata=WORDS
    )

    def __post_init__(self) -> None:
        methods = convert(self.methods, tuple[Any, ...], "methods", WORDS)
        if any(isinstance(one, MeanRank) for one in methods):
            raise ConfigError("methods: mean_rank cannot be one of its own methods; list those that it holds instead.")
        if len(set(methods)) < len(methods):
            raise ConfigError("methods: one of them is given twice; its ranks would count double.")
        if len(methods) < 2:
            raise ConfigError(f"methods: got {len(methods)}, expected at least two to take the mean of.")
        object.__setattr__(self, "methods", methods)

    @property
    def reads_documents(self) -> bool:
        return any(one.reads_documents for one in self.methods)

    @property
    def needs_tokenizer(self) -> bool:
        return any(one.needs_tokenizer for one in self.methods)

    @property
    def saves(self) -> bool:
        return any(one.saves for one in self.methods)

    def scores(self, probe: HeadProbe) -> Tensor:
        ranked = [layer for layer in range(probe.layers) if layer not in probe.windowed]
        mean = torch.zeros(probe.layers, probe.kv_heads, dtype=torch.float64)
        told = []
        for one in self.methods:
            word = spec_word(one)
            alone = dataclasses.replace(probe, measured={}, doubts=[])
            scores = one.scores(alone)[ranked]
            check_scores(scores, word)
            mean[ranked] += ranks(scores) / len(self.methods)
            told.append({"method": word, **alone.measured})
            probe.doubts += alone.doubts
        probe.measured["methods"] = told
        return mean


def ranks(scores: Tensor) -> Tensor:
    """Rank of every score, in (0, 1], 1 the largest; equal scores have the mean of their ranks."""
    flat = scores.flatten()
    below = (flat[:, None] > flat).sum(1)
    upto = (flat[:, None] >= flat).sum(1)
    return ((below + upto + 1).double() / 2 / len(flat)).view(scores.shape)
