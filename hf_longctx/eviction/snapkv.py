"""``score: snapkv``: what the last queries of the prompt attend to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from ..config.bounds import TOKENS
from ..errors import ConfigError
from ._columns import of_kv_heads, weights
from .base import Score, Seen


@dataclass(frozen=True)
class Snapkv(Score):
    """Keep the tokens to which the prompt's last queries attend, and their neighbours.

    The mean of the attention weights of the last ``window`` queries, smoothed over neighbours, and its mean over the
    query heads of a KV head.

    Attributes:
        window: last queries, whose own keys are scored as nothing: `recent` keeps them.
        pool: tokens of a neighbourhood, odd.
        pooling: ``avg`` or ``max`` over the neighbourhood.
    """

    paper: ClassVar[str] = "arXiv:2404.14469"
    cases: ClassVar = ({"window": 8, "pool": 5}, {"window": 16, "pool": 1}, {"window": 8, "pool": 7, "pooling": "max"})

    window: int = field(default=32, metadata={**TOKENS, "max": 4096})
    pool: int = field(default=5, metadata={**TOKENS, "max": 1025})
    pooling: str = field(default="avg", metadata={"choices": ("avg", "max")})

    def __post_init__(self) -> None:
        check_pool(self.pool)

    @property
    def queries(self) -> int:
        return self.window

    def score(self, seen: Seen) -> Tensor:
        before = max(0, seen.k.shape[2] - seen.q.shape[2])  # tokens
        votes = of_kv_heads(seen, smoothed(weights(seen).mean(2)[..., :before], self.pool, self.pooling))
        return pad(votes, (0, seen.k.shape[2] - before))


def smoothed(votes: Tensor, pool: int, pooling: str) -> Tensor:
    """Votes ``[B, H, S]`` as the mean (``avg``) or the largest (``max``) over neighbourhoods of ``pool`` tokens."""
    if not votes.shape[2]:
        return votes
    return (avg_pool1d if pooling == "avg" else max_pool1d)(votes, pool, stride=1, padding=pool // 2)


def check_pool(pool: int) -> None:
    """Raise ConfigError unless a neighbourhood has a middle."""
    if pool % 2 == 0:
        raise ConfigError(f"pool: got {pool}, expected an odd number (tokens).")
