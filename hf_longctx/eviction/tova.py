"""``score: tova``: what the last query of the prompt attends to, alike in all heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ._columns import weights
from .base import Score, Seen


@dataclass(frozen=True)
class Tova(Score):
    """Keep the tokens to which the last query attends: its weights, their mean over all heads of the layer."""

    paper: ClassVar[str] = "arXiv:2401.06104"
    alike: ClassVar[bool] = True

    @property
    def queries(self) -> int:
        return 1

    def score(self, seen: Seen) -> Tensor:
        return weights(seen)[:, :, -1].mean(1, keepdim=True).expand(-1, seen.k.shape[1], -1)
