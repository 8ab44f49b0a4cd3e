"""``pattern: antidiagonal``: key blocks by the sums of scores along antidiagonals.

XAttention, arXiv:2503.16428.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout.blocks import BlockList
from ..layout.pieces import pieces
from . import _blocks
from ._blocks import BlockPattern, always_read, cover, shares, to_blocks
from .base import BLOCK


@dataclass(frozen=True)
class Antidiagonal(BlockPattern):
    """Read the fewest key blocks that hold ``threshold`` of a query block's estimated attention.

    The score matrix is cut into cells of ``stride`` x ``stride`` tokens. A cell's score is the mean of the scores on
    its antidiagonal, where each of its queries meets one of its keys. Each row of cells has a softmax over its cells
    up to its own. The weights of the cells are summed per (query block, key block), and a query block reads the largest
    sums until they reach ``threshold`` of all. The sink block and the own block are read whatever their sums; one of
    them that is among the largest is counted there, the others come on top.

    Where a row or a chunk begins or ends inside a cell, the absent tokens score 0, the mean is over the queries that
    are there, and a row of cells without a query counts for nothing.

    Attributes:
        stride: side of a cell (tokens), a divisor of 64. The estimate costs 1 / stride of the scores.
        threshold: share of the estimated attention; 1 reads everything.
    """

    stride: int = field(default=8, metadata={"min": 1, "max": BLOCK, "unit": "tokens"})
    threshold: float = field(default=0.9, metadata={"min": 0.0, "max": 1.0})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1 or BLOCK % self.stride:
            raise ConfigError(f"stride: got {self.stride}, supported: a divisor of {BLOCK} (1, 2, 4 .. {BLOCK}).")

    @classmethod
    def select(cls, heads: Sequence[Antidiagonal], q: Tensor, k: Tensor, scale: float) -> BlockList:
        kv_len = k.shape[2]
        first = k.shape[2] - q.shape[2]
        group = q.shape[1] // k.shape[1]

        def parts() -> Iterator[tuple[slice, slice, Tensor]]:
            runs = groupby(range(len(heads)), lambda h: (h // group, heads[h].stride))
            for (kv_head, stride), run in [(key, list(run)) for key, run in runs]:
                for some in pieces(len(run), q.shape[0] * kv_len * BLOCK // stride**2, _blocks.TEMPORARY):
                    mine = slice(run[some][0], run[some][-1] + 1)
                    for rows, sums in block_sums(q[:, mine], k[:, kv_head], scale, stride):
                        share = shares(heads[mine], "threshold", sums)[:, None]
                        yield mine, rows, cover(sums, share) | always_read(*sums.shape[2:], q.device)

        shape = (q.shape[0], len(heads))
        return BlockList.from_parts(parts(), shape=shape, block=BLOCK, first=first, kv_len=kv_len)


def block_sums(q: Tensor, k: Tensor, scale: float, stride: int) -> Iterator[tuple[slice, Tensor]]:
    """Weights of cells summed per block, by pieces of query blocks: (which ones, ``[B, G, N, NK up to the last]``).

    q ``[B, G, T, D]`` are query heads of one KV head, the last T of its keys k ``[B, S, D]``. Float32 or wider.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    (batch, heads, q_len, dim), kv_len = q.shape, k.shape[1]
    first = kv_len - q_len
    cells = BLOCK // stride
    key_blocks = -(-kv_len // BLOCK)
    k_cells = to_blocks(k[:, None].to(dtype)).view(batch, key_blocks * cells, stride * dim)
    past = first // BLOCK
    cut = batch * heads * cells * cells * key_blocks
    for rows in pieces(key_blocks - past, cut, _blocks.TEMPORARY):
        low = past + rows.start
        high = past + rows.stop
        own = torch.arange(low * cells, high * cells, device=q.device)
        queries = ((own + 1) * stride).clamp(max=kv_len) - (own * stride).clamp(min=first)  # below 1: there is none
        begin = max(0, low * BLOCK - first)
        some = to_blocks(q[:, :, begin : high * BLOCK - first].to(dtype), first + begin)
        reversed_q = some.unflatten(3, (cells, stride)).flip(4).flatten(4).flatten(2, 3)
        reversed_q *= (scale / queries.clamp(min=1))[:, None]
        scores = reversed_q.flatten(1, 2) @ k_cells[:, : high * cells].transpose(-1, -2)
        scores = scores.unflatten(1, (heads, -1))
        scores[..., low * cells :].masked_fill_(own > own[:, None], float("-inf"))
        weights = scores.softmax(-1)
        if low * BLOCK < first or high * BLOCK > kv_len:
            weights.masked_fill_(queries[:, None] < 1, 0)
        yield rows, weights.unflatten(3, (high, cells)).sum(4).unflatten(2, (-1, cells)).sum(3)
