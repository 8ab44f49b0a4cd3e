"""``score: large_values``: values of a large norm are kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import Score, Seen


@dataclass(frozen=True)
class LargeValues(Score):
    """Keep the tokens whose values have the largest norm.

    Attributes:
        order: of the norm.
    """

    paper = "none"
    agnostic = True
    cases = ({"order": 1.0}, {"order": 2.0})

    order: float = field(default=2.0, metadata={"min": 1.0, "max": 8.0})

    def score(self, seen: Seen) -> Tensor:
        return seen.v.to(torch.promote_types(seen.v.dtype, torch.float32)).norm(p=self.order, dim=-1)
