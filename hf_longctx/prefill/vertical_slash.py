"""``pattern: vertical_slash``: the keys and the distances that the last queries of a prompt look at.

MInference, arXiv:2407.02490.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..kernels.layout import BlockList
from ._blocks import pieces
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

    vertical: int = field(default=1000, metadata={"min": 1, "unit": "tokens"})
    slash: int = field(default=6096, metadata={"min": 1, "unit": "tokens"})

    @classmethod
    def select(cls, heads: Sequence[VerticalSlash], q: Tensor, k: Tensor, scale: float) -> BlockList:
        kv_len, device = k.shape[2], q.device
        first, key_blocks = kv_len - q.shape[2], -(-kv_len // BLOCK)
        by_column, by_offset = line_sums(q[:, :, -LAST_QUERIES:], k, scale)
        columns = best(by_column, cls.budgets(heads, "vertical", kv_len, device))
        columns[..., :BLOCK] = False  # every query block lists the sink block
        offsets = best(by_offset, cls.budgets(heads, "slash", kv_len, device))
        offsets[..., :LOCAL] = True
        # An offset of a * BLOCK + b leads from block i into block i - a, and for b > 0 into block i - a - 1 as well.
        kept = nn.functional.pad(offsets, (0, -kv_len % BLOCK)).unflatten(-1, (key_blocks, BLOCK))
        back = kept.any(-1)  # [B, H, NK], by the number of blocks to go back
        back[..., 1:] |= kept[..., :-1, 1:].any(-1)
        i = torch.arange(first // BLOCK, key_blocks, device=device)[:, None]
        listed = back[..., (i - torch.arange(key_blocks, device=device)).clamp(min=0)]
        listed[..., 0] = True
        return BlockList.from_mask(listed, columns, block=BLOCK, first=first, kv_len=kv_len)


def line_sums(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax weights of q ``[B, H, L, D]``, the last of k ``[B, n, S, D]``, summed per key and per offset i - j.

    Both ``[B, H, S]``, float32 or wider.
    """
    (batch, heads, last, _), (kv_heads, kv_len) = q.shape, k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    late = torch.arange(kv_len, device=q.device) > torch.arange(kv_len - last, kv_len, device=q.device)[:, None]
    folded = q.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [B, n, G * L, D]: a group reads its keys once
    columns, offsets = [], []
    for some in pieces(kv_heads, batch * heads // kv_heads * last * kv_len):
        scores = folded[:, some].to(dtype) @ k[:, some].to(dtype).transpose(-1, -2) * scale
        scores = scores.unflatten(2, (-1, last)).flatten(1, 2)  # [B, heads of this step, L, S]
        weights = scores.masked_fill_(late, float("-inf")).softmax(-1)
        columns.append(weights.sum(-2))
        # Reversed, and each row moved one slot further than the row above, diagonals become columns.
        sheared = nn.functional.pad(weights.flip(-1), (0, last)).flatten(-2)[..., :-last]
        offsets.append(sheared.unflatten(-1, (last, -1)).sum(-2)[..., last - 1 :])
    return torch.cat(columns, 1), torch.cat(offsets, 1)


def best(sums: Tensor, budgets: Tensor) -> Tensor:
    """Bool ``[B, H, S]``: the largest ``budgets [H, 1]`` of sums ``[B, H, S]``, equal ones from the lowest index."""
    order = torch.sort(sums, dim=-1, descending=True, stable=True).indices
    chosen = torch.arange(sums.shape[-1], device=sums.device) < budgets
    return torch.zeros_like(sums, dtype=torch.bool).scatter_(-1, order, chosen.expand_as(order))
