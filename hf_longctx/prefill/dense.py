"""``pattern: dense``: every query block reads every key block up to itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout.blocks import BlockList
from ._blocks import query_pieces
from .base import BLOCK, PatternSpec


@dataclass(frozen=True)
class Dense(PatternSpec):
    """Read every visible key. Alone it is computed as dense attention; in a table its heads list every block."""

    roles = ("retrieval",)
    reads_all = True

    @classmethod
    def select(cls, heads: Sequence[Dense], q: Tensor, k: Tensor, scale: float) -> BlockList:
        shape = (q.shape[0], len(heads))
        device = q.device
        parts = (
            (
                slice(0, len(heads)),
                rows,
                torch.ones(*shape, rows.stop - rows.start, seen, dtype=torch.bool, device=device),
            )
            for rows, seen in query_pieces(q, k)
        )
        kv_len = k.shape[2]
        return BlockList.from_parts(parts, shape=shape, block=BLOCK, first=kv_len - q.shape[2], kv_len=kv_len)
