"""``select: soft_vote``: all query heads of a layer vote for the tokens that they read, until the query changes.

TokenSelect, arXiv:2411.02886.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from ..config.bounds import TOKENS
from ..errors import ConfigError
from ..layout.gather import shape_of
from ._products import products_between
from ._votes import best, vote
from .base import Cached, Index, Select


@dataclass(frozen=True)
class SoftVote(Select):
    """Read the tokens that have most attention in all retrieval heads of the layer together.

    Each query head gives each token its softmax weight among those that may be chosen, with the model's scale; a
    token's vote is their sum, and all heads read the tokens with most votes, at their true positions. To choose, every
    key between sinks and newest tokens is read. The heads of one process vote: under tensor parallel those of the
    others choose by themselves, so the answer depends on how the heads are divided.

    Attributes:
        pool: a token's vote is the most within this width around it, of which it is the middle; 1: its own.
    """

    cases: ClassVar = (
        {"budget": 16, "similar": None, "refresh": 1},
        {"budget": 24, "pool": 5, "refresh": 16},
        {"budget": 40, "mass": 0.7, "similar": 0.5},
        {"share": 0.2, "similar": None, "refresh": 4},
    )
    votes: ClassVar[str] = "layer"

    sink: int = field(default=128, metadata=TOKENS)
    recent: int = field(default=512, metadata=TOKENS)
    refresh: int = field(default=64, metadata=TOKENS)
    similar: float | None = field(default=0.9, metadata={"min": -1.0, "max": 1.0})
    pool: int = field(default=1, metadata={"min": 1, "max": 4095, "unit": "tokens"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool % 2 == 0:
            raise ConfigError(f"pool: got {self.pool}, expected an odd number, so that the token is in the middle.")

    def pick(
        self, q: Tensor, index: Index, cached: Cached, low: int, high: int, width: int, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        heads = shape_of(cached)[1]
        votes = vote(self.scores(q, index, cached, low, high, scale), heads, self.votes)[:, :1]
        if self.pool > 1:
            votes = nn.functional.max_pool1d(votes, self.pool, 1, self.pool // 2)
        entries, counts = best(votes, width, self.mass)
        return entries.expand(-1, heads, -1), None if counts is None else counts.expand(-1, heads)

    def scores(self, q: Tensor, index: Index, cached: Cached, low: int, high: int, scale: float) -> Tensor:
        return products_between(q, cached, low, high) * scale
