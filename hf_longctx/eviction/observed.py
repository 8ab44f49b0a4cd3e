"""``score: observed``: what all queries so far attended to, together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._columns import column_sums, grown, readers
from .base import Score, Seen


@dataclass(frozen=True)
class Observed(Score):
    """Keep the tokens that got the most attention of all queries of the prompt (the heavy hitters of H2O).

    The sum of the attention weights over the queries, and its mean over the query heads of a KV head. Costs a second
    pass over the scores of the prompt. Queries of decoded tokens are not counted.

    Attributes:
        mean: divide by the number of queries that see the token: a sum favours early tokens, a mean late ones.
    """

    paper: ClassVar[str] = "arXiv:2306.14048"
    gathers: ClassVar[bool] = True
    by_token: ClassVar[tuple[str, ...]] = ("sums", "readers")
    cases: ClassVar = ({}, {"mean": True})

    mean: bool = False

    def gather(self, seen: Seen) -> None:
        seen.state["sums"] = grown(seen, "sums") + column_sums(seen)
        if self.mean:
            count = readers(seen).to(torch.float32).expand(seen.k.shape[:3])
            seen.state["readers"] = grown(seen, "readers") + count

    def score(self, seen: Seen) -> Tensor:
        sums = grown(seen, "sums")
        return sums / grown(seen, "readers").clamp_min(1) if self.mean else sums
