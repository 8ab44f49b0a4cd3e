"""``score: key_diff``: keys unlike the others are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .base import Score, Seen


@dataclass(frozen=True)
class KeyDiff(Score):
    """Keep the tokens whose keys are least like the mean key of their head.

    Minus the cosine of a key and the mean of all cached keys, each of length 1. The paper evicts block by block: set
    ``every`` of the store.
    """

    paper: ClassVar[str] = "arXiv:2504.15364"
    agnostic: ClassVar[bool] = True

    def score(self, seen: Seen) -> Tensor:
        k = normalize(seen.k.to(torch.promote_types(seen.k.dtype, torch.float32)), dim=-1)
        return -(k @ normalize(k.mean(2, keepdim=True), dim=-1).transpose(2, 3)).squeeze(-1)
