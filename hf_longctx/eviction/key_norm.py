"""``score: key_norm``: keys of a small norm are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Score, Seen


@dataclass(frozen=True)
class KeyNorm(Score):
    """Keep the tokens whose keys have the smallest L2 norm: they get the most attention."""

    paper: ClassVar[str] = "arXiv:2406.11430"
    agnostic: ClassVar[bool] = True

    def score(self, seen: Seen) -> Tensor:
        return -seen.k.to(torch.promote_types(seen.k.dtype, torch.float32)).norm(dim=-1)
