"""``pattern: vertical_slash``: the keys and the distances that the last queries of a prompt look at.

MInference, arXiv:2407.02490.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn

from ..config.bounds import TOKENS
from ..layout.blocks import BlockList
from ..layout.pieces import pieces
from . import _blocks
from ._blocks import best, query_pieces
from .base import BLOCK, PatternSpec

LAST_QUERIES = 64  # queries whose attention chooses
LOCAL = 64  # offsets that are always kept; so is the first block (the sinks)


@dataclass(frozen=True)
class VerticalSlash(PatternSpec):
    """Read the ``vertical`` best key tokens (columns) and the ``slash`` best diagonals of each head.

    The last 64 queries attend causally to all keys. Their softmax weights, summed per key, rank the columns; summed per
    offset i - j they rank the diagonals. Query block i then reads every column before it and every key block in which
    one of its 64 positions q finds a key q - o of a kept offset o. Positions count whether the chunk brings them or
    not.

    The sums run over all keys and offsets, as in the paper's algorithm. The sink block (the first 64 tokens) and the
    offsets below 64 (a query's own block and the one before) are read whatever their sums; one of them that is among
    the best uses up budget, as there, the others come on top.

    A prompt read in chunks is chosen for chunk by chunk, by the last 64 queries of each, from all keys up to its end:
    its answer differs from that of the prompt read at once.

    Attributes:
        vertical: columns per head (tokens).
        slash: diagonals per head (tokens of offset).
    """

    roles = ("retrieval",)

    vertical: int = field(default=1000, metadata=TOKENS)
    slash: int = field(default=6096, metadata=TOKENS)

    @classmethod
    def select(cls, heads: Sequence[VerticalSlash], q: Tensor, k: Tensor, scale: float) -> BlockList:
        kv_len = k.shape[2]
        device = q.device
        first = kv_len - q.shape[2]
        key_blocks = -(-kv_len // BLOCK)
        by_column, by_offset = line_sums(q[:, :, -LAST_QUERIES:], k, scale)
        columns = best(by_column, [head.vertical for head in heads])
        columns[..., :BLOCK] = False  # every query block lists the sink block
        offsets = best(by_offset, [head.slash for head in heads])
        offsets[..., :LOCAL] = True
        # An offset of a * BLOCK + b leads from block i into block i - a, and for b > 0 into block i - a - 1 as well.
        kept = nn.functional.pad(offsets, (0, -kv_len % BLOCK)).unflatten(-1, (key_blocks, BLOCK))
        back = kept.any(-1)  # [B, H, NK], by the number of blocks to go back
        back[..., 1:] |= kept[..., :-1, 1:].any(-1)

        def parts() -> Iterator[tuple[slice, slice, Tensor]]:
            for rows, seen in query_pieces(q, k):
                i = torch.arange(rows.start, rows.stop, device=device)[:, None] + first // BLOCK
                listed = back[..., (i - torch.arange(seen, device=device)).clamp(min=0)]
                listed[..., 0] = True
                yield slice(0, len(heads)), rows, listed

        shape = (q.shape[0], len(heads))
        return BlockList.from_parts(parts(), columns, shape=shape, block=BLOCK, first=first, kv_len=kv_len)


def line_sums(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax weights of q ``[B, H, L, D]``, the last of k ``[B, n, S, D]``, summed per key and per offset i - j.

    Both ``[B, H, S]``, float32 or wider.
    """
    (batch, heads, last, dim), (kv_heads, kv_len) = q.shape, k.shape[1:3]
    group = heads // kv_heads
    width = last + kv_len
    queries = q.to(torch.promote_types(q.dtype, torch.float32)) * scale
    late = torch.ones(last, last, dtype=torch.bool, device=q.device).triu(1)  # among the last keys
    columns, offsets = (queries.new_empty(batch, heads, kv_len) for _ in range(2))
    keys = queries.new_zeros(width, dim)
    for row, kv_head in product(range(batch), range(kv_heads)):
        keys[last:] = k[row, kv_head]
        for some in pieces(group, last * width, _blocks.TEMPORARY):
            some = slice(kv_head * group + some.start, kv_head * group + some.stop)
            scores = (queries[row, some].flatten(0, 1) @ keys.T).unflatten(0, (-1, last))  # [g, L, L + S]
            scores[..., :last] = float("-inf")
            scores[..., -last:].masked_fill_(late, float("-inf"))
            weights = scores.softmax(-1)
            columns[row, some] = weights[..., last:].sum(1)
            # Each row one place to the left of the row above: diagonals become columns, the longest offset first.
            diagonals = weights.as_strided((len(weights), last, kv_len), (last * width, width + 1, 1), 1)
            offsets[row, some] = diagonals.sum(1).flip(-1)
    return columns, offsets
