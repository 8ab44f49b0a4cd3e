"""``score: keyformer``: what all queries attended to, with noise on their scores."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config.bounds import MOST
from ._columns import column_sums, grown
from .base import Score, Seen

BITS = 23  # of a random number: the largest below 1 is one in float32
MASK = (1 << 32) - 1


@dataclass(frozen=True)
class Keyformer(Score):
    """Keep the tokens that got the most of a flattened attention of all queries of the prompt.

    The sum over the queries of ``softmax((score + noise * Gumbel) / tau)``, and its mean over the query heads of a KV
    head. The noise is a function of the seed, the layer, the head among those scored together, and the positions of
    query and key: a sequence gets the same in any batch and in any pieces. Without noise, at ``tau`` 1, it is
    `observed`. ``tau`` stays as it is: the authors let it grow with each decoded token, and evict there as well.

    Attributes:
        tau: temperature of the softmax.
        noise: factor of the Gumbel noise; 0 for none.
        seed: of the noise.
    """

    paper: ClassVar[str] = "arXiv:2403.09054"
    gathers: ClassVar[bool] = True
    by_token: ClassVar[tuple[str, ...]] = ("sums",)
    cases: ClassVar = ({}, {"tau": 2.0, "seed": 3}, {"noise": 0.0})

    tau: float = field(default=1.0, metadata={"min": 0.01, "max": 100.0})
    noise: float = field(default=1.0, metadata={"min": 0.0, "max": 100.0})
    seed: int = field(default=0, metadata={"min": 0, "max": MOST})

    def gather(self, seen: Seen) -> None:
        sinks = seen.scores.sinks
        if sinks is not None:
            seen = replace(seen, scores=replace(seen.scores, sinks=sinks / self.tau))

        def flattened(part: Seen, made: Tensor, low: int, high: int) -> Tensor:
            if self.noise:
                made = made + self.noise * gumbel(self.seed, part, low, high).to(made.dtype)
            return made / self.tau

        seen.state["sums"] = grown(seen, "sums") + column_sums(seen, flattened)

    def score(self, seen: Seen) -> Tensor:
        return grown(seen, "sums")


def gumbel(seed: int, seen: Seen, low: int, high: int) -> Tensor:
    """Standard Gumbel noise of the scores of the queries ``low .. high`` of ``seen.q``, float32 ``[H, high - low, S]``.

    Each number depends on its own seed, layer, head, query and key alone.
    """
    heads = torch.arange(seen.q.shape[1], device=seen.k.device)
    queries = torch.arange(seen.first + low, seen.first + high, device=seen.k.device)
    mixed = mix(mix(seed) ^ seen.layer)
    for numbers in (heads[:, None, None], queries[:, None], seen.positions):
        mixed = mix(mixed ^ numbers)
    uniform = ((mixed >> (32 - BITS)).to(torch.float32) + 0.5) * 2.0**-BITS
    return uniform.log_().neg_().log_().neg_()


def mix(x: Any) -> Any:
    """A number below 2^32, or int64 of them, as another such number that looks random: one-to-one, no overflow."""
    x = (x + 0x9E3779B9) & MASK
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & MASK
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & MASK
    return x ^ (x >> 15)
