"""The base of every identification method, and what a method is given.

A YAML word of this folder names a frozen dataclass in the file of the same name. Its fields are the method's options.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...io.progress import Progress
from ...tasks.answer import input_device
from ...tasks.documents import Documents

logger = logging.getLogger(__name__)


@dataclass
class HeadProbe:
    """The model under test and what it is asked.

    Attributes:
        model: patched with all heads retrieval (what ``observe`` needs), in eval mode, without gradients.
        layers, heads, kv_heads: its attention dimensions.
        documents: makes texts with facts in the tokenizer's language.
        seed: random seed.
        windowed: layers with a sliding window of the model's own or without attention: their heads have no role.
        longest: tokens the model was made for.
        work: a folder for what a long run saves and goes on from, or None.
        progress: show on stderr how far it is.
        measured: what a method leaves for ``heads.measured`` of the config, plain data.
        doubts: why the scores may say nothing about this model; with any the config's confidence is low.
    """

    model: nn.Module
    layers: int
    heads: int
    kv_heads: int
    documents: Documents
    windowed: tuple[int, ...] = ()
    seed: int = 0
    longest: int = 4096
    work: Path | None = None
    progress: bool = False
    measured: dict[str, Any] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where the model takes its input ids."""
        return input_device(self.model)

    def rng(self, *stream: int) -> np.random.Generator:
        """A generator that depends on the seed and ``stream`` alone."""
        return np.random.default_rng([self.seed, *stream])

    def ids(self, tokens: np.ndarray) -> Tensor:
        """Token ids ``[T]`` as the model's input ``[1, T]``."""
        return torch.from_numpy(np.asarray(tokens, dtype=np.int64))[None].to(self.device)

    def per_group(self, scores: Tensor) -> Tensor:
        """Scores ``[..., H]`` of query heads as scores ``[..., H_kv]``: a KV head takes the largest of its group."""
        return scores.unflatten(-1, (self.kv_heads, self.heads // self.kv_heads)).amax(-1)

    def doubt(self, reason: str) -> None:
        """Note that the scores may say nothing, and warn of it."""
        logger.warning("%s. Compare with another method, or measure the share with target_drop.", reason)
        self.doubts.append(reason)

    def track(self, label: str, total: int, unit: str, done: int = 0, shown: bool = True) -> Progress:
        """Shows how many of ``total`` are done, where that is wanted; ``done`` of them by an earlier run."""
        return Progress(label, total, unit, shown=shown and self.progress, done=done)

    def length(self, given: int | None, default: int, name: str = "length") -> int:
        """``given`` tokens, or ``default`` cut to what the model was made for; more than that is only warned of."""
        if given is not None and given > self.longest:
            logger.warning("%s: %d tokens are more than the %d the model was made for", name, given, self.longest)
        return min(default, self.longest) if given is None else given


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """On exit every module is in the mode (train or eval) it was in, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_scores(scores: Tensor, method: str) -> None:
    """Raise ConfigError where the scores of ``method``, a word, rank no head."""
    if not torch.isfinite(scores).all():
        raise ConfigError(f"identify: {method} gave scores that are nan or inf; is the model's dtype too narrow?")
    if not (scores > 0).any():
        raise ConfigError(
            f"identify: {method} scored every head 0, so none of them can be called a retrieval head. Measure longer "
            "or with other options, or with another method."
        )


class Method(ABC):
    """What a word of ``identify/`` defines.

    Attributes:
        paper: where the method comes from.
        reads_documents: whether its texts are the probe's documents, so that the user's own text has a use.
        saves: whether it saves its state in the probe's work folder.
        needs_tokenizer: whether it writes documents; otherwise random token ids are all it reads.
        cases: small settings, fields by name, for the tests: the first finds the heads of an embedded model, the last
            is the quickest.
    """

    paper: ClassVar[str]
    reads_documents: ClassVar[bool] = True
    saves: ClassVar[bool] = False
    needs_tokenizer: ClassVar[bool] = True
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    @abstractmethod
    def scores(self, probe: HeadProbe) -> Tensor:
        """Scores ``[layers, KV heads]``, higher = more retrieval, float64 on the CPU."""
