"""``after: drop``: evicted tokens are gone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import After, Left


@dataclass(frozen=True)
class Drop(After):
    """Drop the evicted tokens."""

    def apply(self, k: Tensor, v: Tensor, bias: Tensor | None, keep: Tensor) -> Left:
        return Left(k[keep], v[keep], None if bias is None else bias[keep])
