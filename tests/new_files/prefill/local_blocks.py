"""``pattern: local_blocks``: the first block and the latest ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..layout.blocks import BlockList
from .base import BLOCK, PatternSpec


@dataclass(frozen=True)
class LocalBlocks(PatternSpec):
    """Read the first block and the latest ``near`` ones.

    Attributes:
        near: latest blocks, the query's own among them.
    """

    roles = ("retrieval",)

    near: int = field(default=2, metadata={"min": 1, "max": 2**20, "unit": "blocks"})

    @classmethod
    def select(cls, heads: Sequence[LocalBlocks], q: Tensor, k: Tensor, scale: float) -> BlockList:
        kv_len, first = k.shape[2], k.shape[2] - q.shape[2]
        key = torch.arange(-(-kv_len // BLOCK), device=q.device)
        back = key[first // BLOCK :, None] - key
        mask = torch.stack([(back < head.near) | (key == 0) for head in heads])
        return BlockList.from_mask(mask.expand(len(q), -1, -1, -1), block=BLOCK, first=first, kv_len=kv_len)
