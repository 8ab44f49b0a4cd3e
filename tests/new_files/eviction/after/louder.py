"""``after: louder``: what is left speaks for what is gone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import After, Left


@dataclass(frozen=True)
class Louder(After):
    """Drop the evicted tokens, and let those that are left get the attention of as many as there were.

    Attributes:
        weight: of the logarithm that is added to their scores.
    """

    biased = True
    cases = ({"weight": 0.5},)

    weight: float = field(default=1.0, metadata={"min": 0.0, "max": 1.0})

    def apply(self, k: Tensor, v: Tensor, bias: Tensor | None, keep: Tensor) -> Left:
        before = torch.zeros(len(k), device=k.device) if bias is None else bias
        more = self.weight * math.log(len(k) / max(1, int(keep.sum())))
        return Left(k[keep], v[keep], before[keep] + more)
