"""``select: tree``: search the tokens with the highest scores by halving chunks, a few of whose keys are read.

HiP attention, arXiv:2406.09827.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..config.bounds import TOKENS
from ..kernels.reference import products
from ..layout.gather import shape_of, take_keys
from ._votes import best, vote
from .base import Cached, Index, Select


@dataclass(frozen=True)
class Tree(Select):
    """Search the chunks of tokens with the highest scores, from large chunks down to small ones.

        what may be chosen         |-----------------------------------|
        twice as many, half kept   |    x   |   (x)   |    x   |  (x)  |   each scored by its middle token x
        halved, half kept                   | x  |(x) |        |(x)| x |   until a chunk has ``chunk`` tokens

    What may be chosen is cut into twice as many chunks as are read, and the best half of them are halved until they
    have ``chunk`` tokens. No index is kept, and no other keys are read than those of the middle tokens: about
    ``2 budget / chunk`` for each of the ``log2`` of (tokens / budget) rounds. A KV head chooses by the highest score of
    its query heads; the paper, by each query head. A token between middle tokens is found only where its neighbours'
    keys are like its own: nothing bounds what is missed.

    Where the tokens are no power of two, sizes of chunks differ by at most ``chunk`` and the first half is the larger;
    a chunk that is as small as it gets waits for the others. Of an even number of tokens the middle one is the later.

    Attributes:
        chunk: tokens of the smallest chunks, which are read whole.
    """

    cases: ClassVar = (
        {"budget": 16},
        {"budget": 24, "chunk": 4, "refresh": 1},
        {"budget": 40, "chunk": 1, "mass": 0.8},
        {"share": 0.2, "chunk": 3, "similar": 0.5, "refresh": 32},
    )

    budget: int = field(default=512, metadata=TOKENS)
    refresh: int = field(default=8, metadata=TOKENS)
    chunk: int = field(default=2, metadata={"min": 1, "max": 128, "unit": "tokens"})

    @property
    def size(self) -> int:
        return self.chunk

    def pick(
        self, q: Tensor, index: Index, cached: Cached, low: int, high: int, width: int, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        batch, heads = shape_of(cached)[:2]
        total = high - low
        width = min(width, total)
        edges = torch.arange(2 * width + 1, device=q.device) * total // (2 * width) + low
        begin, end = (x.expand(batch, heads, -1) for x in (edges[:-1], edges[1:]))
        widest = -(-total // (2 * width))
        while widest > 1:
            kept, _ = best(self._votes_of(q, cached, begin, end, scale), width)
            begin, end = _halves(*(x.gather(2, kept.long()) for x in (begin, end)))
            widest = -(-widest // 2)
        kept, counts = best(self._votes_of(q, cached, begin, end, scale), width, self.mass)
        return begin.gather(2, kept.long()).int() - low, counts

    def _votes_of(self, q: Tensor, cached: Cached, begin: Tensor, end: Tensor, scale: float) -> Tensor:
        """The votes for chunks of the entries ``begin .. end``, int64 ``[B, n, C]``; none for those without entries."""
        middle = begin * self.chunk + (end - begin) * self.chunk // 2
        votes = vote(products(q, take_keys(cached, middle)) * scale, middle.shape[1], self.votes)
        lowest = torch.finfo(votes.dtype).min
        votes = votes.nan_to_num(nan=lowest, posinf=float("inf"), neginf=lowest)
        return votes.masked_fill(begin == end, float("-inf"))


def _halves(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """The chunks ``begin .. end`` halved, in order, ``[B, n, 2 C]``; the second half of a single entry is empty."""
    middle = (begin + end + 1) // 2
    return torch.stack([begin, middle], 3).flatten(2), torch.stack([middle, end], 3).flatten(2)
