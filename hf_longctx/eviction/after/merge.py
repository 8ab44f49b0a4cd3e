"""``after: merge``: evicted tokens go into the kept one that is most like them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .base import After, Left

TEMPORARY = 1 << 24  # similarities that are made at once
FLOAT = torch.float32


@dataclass(frozen=True)
class Merge(After):
    """Merge evicted tokens into the kept one with the most similar key, or drop them where none is similar.

    A token stands for a count of tokens: its key and value are their means, and log(count) is added to its scores, so
    that it gets their attention. Copies of a token merge without loss. The bias of an earlier eviction is its count.
    EMS (arXiv:2412.08521) merges by similarity and a threshold as well; its weights were not verified.

    Attributes:
        similarity: cosine of two keys above which they are merged. From 1 on nothing is.
    """

    biased: ClassVar[bool] = True
    cases: ClassVar = ({"similarity": 0.5}, {"similarity": 1.0})

    similarity: float = field(default=0.8, metadata={"min": -1.0, "max": 1.0})

    def apply(self, k: Tensor, v: Tensor, bias: Tensor | None, keep: Tensor) -> Left:
        bias = torch.zeros(k.shape[0], dtype=FLOAT, device=k.device) if bias is None else bias
        gone, into = self._pairs(k[~keep], k[keep])
        if not len(gone):
            return Left(k[keep], v[keep], bias[keep])
        counts = bias.to(torch.promote_types(k.dtype, FLOAT)).exp()
        more, own = counts[~keep][gone], counts[keep]
        sums = own.index_add(0, into, more)

        def mean(x: Tensor) -> Tensor:
            total = (own[:, None] * x[keep]).index_add(0, into, more[:, None] * x[~keep][gone])
            return torch.where((sums > own)[:, None], (total / sums[:, None]).to(x.dtype), x[keep])

        return Left(mean(k), mean(v), torch.where(sums > own, sums.log().to(FLOAT), bias[keep]))

    def _pairs(self, evicted: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the evicted keys are merged, and into which kept one each: indices."""
        dtype = torch.promote_types(kept.dtype, FLOAT)
        gone = torch.arange(0, device=kept.device)
        if self.similarity >= 1 or not len(kept) or not len(evicted):
            return gone, gone
        kept = normalize(kept.to(dtype), dim=-1).T
        parts = normalize(evicted.to(dtype), dim=-1).split(max(1, TEMPORARY // kept.shape[1]))
        alike, nearest = (torch.cat(found) for found in zip(*((part @ kept).max(-1) for part in parts), strict=True))
        gone = (alike > self.similarity).nonzero().flatten()
        return gone, nearest[gone]
