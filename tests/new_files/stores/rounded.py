"""``store: rounded``: every token, keys and values rounded to a grid."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..layout.heads import RoleHeads
from .full import Full, FullStore


@dataclass(frozen=True)
class Rounded(Full):
    """Keep every token, keys and values rounded to a grid.

    Attributes:
        steps: grid steps per unit.
    """

    exact = False
    cases = ({"steps": 64},)

    steps: int = field(default=64, metadata={"min": 1, "max": 4096, "unit": "steps"})

    def new(self, heads: RoleHeads, max_tokens: int | None) -> RoundedStore:
        return RoundedStore(self, heads, max_tokens)


class RoundedStore(FullStore):
    def append(self, k: Tensor, v: Tensor, rows):
        return super().append(self.rounded(k), self.rounded(v), rows)

    def rounded(self, x: Tensor) -> Tensor:
        return (x * self.spec.steps).round() / self.spec.steps
