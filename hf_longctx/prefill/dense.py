"""``pattern: dense``: every query block reads every key block up to itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.layout import BlockList
from .base import BLOCK, PatternSpec


@dataclass(frozen=True)
class Dense(PatternSpec):
    """Read every visible key. Alone it is computed as dense attention; in a table its heads list every block."""

    roles = ("retrieval",)
    reads_all = True

    @classmethod
    def select(cls, heads: Sequence[Dense], q: Tensor, k: Tensor, scale: float) -> BlockList:
        (batch, _, q_len, _), kv_len = q.shape, k.shape[2]
        first, key_blocks = kv_len - q_len, -(-kv_len // BLOCK)
        shape = (batch, len(heads), key_blocks - first // BLOCK, key_blocks)
        every = torch.ones(shape, dtype=torch.bool, device=q.device)
        return BlockList.from_mask(every, block=BLOCK, first=first, kv_len=kv_len)
