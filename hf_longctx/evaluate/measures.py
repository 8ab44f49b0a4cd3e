"""What is computed from the outputs of two ways of running a model: no model, no prompt, no clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from ..errors import ConfigError
from ..model.losses import LOGITS

DRAWS = 1 << 22  # indices drawn at once
FEW = 6  # pairs: all of 5 differ in the same direction by chance in 1 of 16 runs, too often for 95%
ENOUGH = 30  # pairs: where none of them differs, up to one in ten others may
MARGIN = 0.05  # of the accuracy: the loss that "as well as" rules out
RULE = (
    f"As well as: at least {ENOUGH} prompts, and a 95% interval that contains 0 and goes no lower than -{MARGIN:g}. "
    f"Worse and better: at least {FEW} prompts, and a 95% interval below or above 0."
)


@dataclass(frozen=True)
class NextToken:
    """How two ways of running a model predict the next token, at the same positions of the same text.

    Attributes:
        positions: how many were compared.
        agreement: share of them whose most likely token is the same; where logits are no numbers (nan), it is not.
        kl: mean of KL(dense || patched), in nats; ``kl_max`` is the largest.
    """

    positions: int
    agreement: float
    kl: float
    kl_max: float


def next_token(dense: Tensor, patched: Tensor, head: Callable[[Tensor], Tensor] | None = None) -> NextToken:
    """Agreement and KL of the next token.

    Args:
        dense, patched: logits ``[T, V]`` at the positions to compare, or with ``head`` hidden states ``[T, D]``.
        head: hidden states ``[n, D]`` to logits ``[n, V]``. It is called for a few rows at a time, so that no more than
            ``LOGITS`` logits of each side are ever in memory, whatever T.

    Raises:
        ConfigError: the shapes differ, or there is no position.
    """
    if dense.dim() != 2 or dense.shape != patched.shape or not len(dense):
        raise ConfigError(
            f"got shapes {tuple(dense.shape)} and {tuple(patched.shape)}, expected [positions, width] twice, the same."
        )
    head = head if head is not None else lambda states: states
    rows = max(1, LOGITS // head(dense[:1]).shape[-1])
    same = 0
    divergences = []
    for a, b in zip(dense.split(rows), patched.split(rows), strict=True):
        a = head(a)
        b = head(b)
        equal = a.argmax(-1) == b.argmax(-1)
        a = log_softmax(a, -1, dtype=torch.float32)
        b = log_softmax(b, -1, dtype=torch.float32)
        divergences.append(kl_div(b, a, reduction="none", log_target=True).sum(-1).clamp_min(0))  # rounding, below 0
        same += int((equal & ~divergences[-1].isnan()).sum())
    kl = torch.cat(divergences).double()
    return NextToken(len(dense), same / len(dense), kl.mean().item(), kl.max().item())


@dataclass(frozen=True)
class SameTokens:
    """How far two generated answers are the same.

    Attributes:
        compared: tokens of the longer one.
        prefix: tokens they have in common from the start on; where it is ``compared``, the answers are equal.
        equal: share of the positions of the longer one where both have the same token.
    """

    compared: int
    prefix: int
    equal: float


def same_tokens(dense: Sequence[int], patched: Sequence[int]) -> SameTokens:
    """Compare two answers position by position; what only one of them has counts as different."""
    compared = max(len(dense), len(patched))
    same = [a == b for a, b in zip(dense, patched, strict=False)]
    prefix = same.index(False) if False in same else len(same)
    return SameTokens(compared, prefix, sum(same) / compared if compared else 1.0)


@dataclass(frozen=True)
class Interval:
    """A difference of two means over ``pairs`` questions, and its confidence interval.

    ``low`` and ``high`` are None for a single pair, of which resampling learns nothing.
    """

    difference: float
    low: float | None
    high: float | None
    pairs: int
    confidence: float

    @property
    def verdict(self) -> str | None:
        """``"as well as"``, ``"worse"`` or ``"better"``, by ``RULE``; None where the pairs are too few to tell."""
        if self.low is None or self.high is None:
            return None
        if self.pairs >= FEW and (self.high < 0 or self.low > 0):
            return "worse" if self.high < 0 else "better"
        return "as well as" if self.pairs >= ENOUGH and -MARGIN <= self.low <= 0 <= self.high else None


def paired_bootstrap(
    dense: Sequence[float],
    patched: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The percentile interval of mean(patched) - mean(dense), by drawing questions with replacement.

    Both answered the same questions, so pairs are drawn: what makes a question hard for both does not widen the
    interval. Where every pair differs by the same amount the interval has no width, however few pairs there are.

    Args:
        dense, patched: one number per question, in the same order; hits (bool) for accuracies.
        seed: the same seed and pairs give the same interval.

    Raises:
        ConfigError: no pairs, a different number of either, numbers out of bounds, or what is no number (nan).

    Paper: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    if len(dense) != len(patched) or not len(dense):
        raise ConfigError(f"got {len(dense)} dense and {len(patched)} patched results, expected as many of both.")
    if not 0 < confidence < 1 or resamples < 1:
        raise ConfigError(f"confidence must lie between 0 and 1 and resamples be >= 1: {confidence}, {resamples}.")
    pairs = np.asarray(patched, np.float64) - np.asarray(dense, np.float64)
    if not np.isfinite(pairs).all():
        raise ConfigError(f"got {int((~np.isfinite(pairs)).sum())} of {len(pairs)} results that are no finite numbers.")
    n = len(pairs)
    rng = np.random.default_rng(seed)
    if n == 1:
        return Interval(float(pairs[0]), None, None, 1, confidence)
    means = np.empty(resamples)
    rows = max(1, DRAWS // n)
    for done in range(0, resamples, rows):
        drawn = rng.integers(n, size=(min(rows, resamples - done), n))
        means[done : done + rows] = pairs[drawn].mean(1)
    low, high = np.percentile(means, [50 * (1 - confidence), 50 * (1 + confidence)])
    return Interval(float(pairs.mean()), float(low), float(high), n, confidence)


@dataclass(frozen=True)
class Mean:
    """A mean and its confidence interval of 95 %; ``low`` and ``high`` are None for a single number."""

    mean: float
    low: float | None
    high: float | None


def mean_of(numbers: Sequence[float]) -> Mean:
    """The mean of a set, with the interval of ``paired_bootstrap``."""
    found = paired_bootstrap([0.0] * len(numbers), numbers)
    return Mean(found.difference, found.low, found.high)


@dataclass(frozen=True)
class Perplexity:
    """How well a text was predicted: the sum of its tokens' negative log-likelihoods, in nats."""

    nll: float
    tokens: int

    @property
    def value(self) -> float:
        """exp of the mean negative log-likelihood; infinite where that is too large for a float."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf
