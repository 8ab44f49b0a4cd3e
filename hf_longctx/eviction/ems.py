"""``score: ems``: what all queries attended to, or the last ones, whichever is more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..config.bounds import TOKENS
from ._columns import of_kv_heads, readers, weights
from .base import Score, Seen
from .observed import Observed

WHOLE = Observed(mean=True)


@dataclass(frozen=True)
class Ems(Score):
    """Keep the tokens that matter globally or locally; its authors merge the others (``after: {after: merge}``).

    Globally: the mean attention weight over all queries that see a token. Locally: the same over the last ``window``
    queries. The score is the greater of both, each divided by its sum over the cached tokens of the head. That they are
    aligned so, by their sums, is a choice: how the paper does it was not verified.

    Attributes:
        window: last queries, the local ones.
    """

    paper: ClassVar[str] = "arXiv:2412.08521"
    gathers: ClassVar[bool] = True
    by_token: ClassVar[tuple[str, ...]] = WHOLE.by_token
    cases: ClassVar = ({"window": 8},)

    window: int = field(default=32, metadata={**TOKENS, "max": 4096})

    @property
    def queries(self) -> int:
        return self.window

    def gather(self, seen: Seen) -> None:
        WHOLE.gather(seen)

    def score(self, seen: Seen) -> Tensor:
        near = of_kv_heads(seen, weights(seen).sum(2)) / readers(seen).clamp_min(1)
        return torch.maximum(*(normalize(made, p=1, dim=-1) for made in (WHOLE.score(seen), near)))
