"""Block lists of one query on the CPU: what its list names is gathered from wherever it lies, and nothing else.

Shapes: ``B`` batch, ``H`` query heads, ``n`` KV heads, ``L`` lists of a KV head, ``W`` keys that a list may name, ``D``
head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..layout.blocks import BlockList
from ..layout.pieces import pieces
from ..layout.segments import Segment

TEMPORARY = 1 << 20  # elements of gathered keys, unless the lists of one KV head name more

Attend = Callable[..., tuple[Tensor, Tensor]]  # (q, k, v, bias) -> (out, lse)


def attend(q: Tensor, segments: Sequence[Segment], blocks: BlockList, dense: Attend) -> tuple[Tensor, Tensor]:
    """(out ``[B, H, 1, D]``, lse ``[B, H, 1]``) of the query at the position ``blocks.first``, by ``dense``."""
    kv_heads = segments[0].k.shape[1]
    group = q.shape[1] // kv_heads
    lists = blocks.counts.shape[1] // kv_heads
    tokens, named = (x.unflatten(1, (kv_heads, lists)) for x in _tokens(blocks))
    width = tokens.shape[3] * q.shape[3]
    rows = []
    with torch.autocast(q.device.type, enabled=False):  # it would round the scores
        for row in pieces(q.shape[0], width, TEMPORARY):
            parts = []
            for heads in pieces(kv_heads, (row.stop - row.start) * lists * width, TEMPORARY):
                k, v = _gathered(segments, tokens[row, heads], row, heads)
                bias = torch.zeros_like(named[row, heads], dtype=q.dtype).masked_fill_(~named[row, heads], -math.inf)
                own = q[row, heads.start * group : heads.stop * group]
                parts.append(dense(own, k, v, bias=bias.flatten(1, 2)[:, :, None]))
            rows.append([torch.cat(found, 1) for found in zip(*parts, strict=True)])
    out, lse = (torch.cat(found) for found in zip(*rows, strict=True))
    return out, lse


def _tokens(blocks: BlockList) -> tuple[Tensor, Tensor]:
    """Positions ``[B, lists, W]`` that the one query block names, and which of them are keys that it reads."""
    last = blocks.first  # the position of the query
    listed = torch.arange(blocks.indices.shape[3], device=blocks.indices.device) < blocks.counts[:, :, 0, None]
    inside = torch.arange(blocks.block, device=listed.device)
    tokens = (blocks.indices[:, :, 0, :, None].long() * blocks.block + inside).flatten(2)
    named = listed.repeat_interleave(blocks.block, 2) & (tokens <= last)
    if not blocks.columns.shape[2]:
        return tokens, named
    columns = blocks.columns.long()
    read = torch.arange(columns.shape[2], device=listed.device) < blocks.column_counts[..., None]
    read &= columns < last // blocks.block * blocks.block
    read &= ~blocks.block_mask()[:, :, 0].gather(2, columns // blocks.block)
    return torch.cat([tokens, columns], 2), torch.cat([named, read], 2)


def _gathered(segments: Sequence[Segment], tokens: Tensor, row: slice, heads: slice) -> tuple[Tensor, Tensor]:
    """k, v ``[b, h * L, W, D]`` at ``tokens [b, h, L, W]`` of h KV heads; any filled slot beyond the last segment."""
    found = None
    begin = 0
    for segment in segments:
        if not segment.longest:
            continue
        at = (tokens - begin).clamp(0, segment.longest - 1).flatten(2)[..., None]
        own = [x[row, heads].gather(2, at.expand(-1, -1, -1, x.shape[3])) for x in segment.contents()]
        if found is not None:
            here = (tokens >= begin).flatten(2)[..., None]
            own = [torch.where(here, x, before) for x, before in zip(own, found, strict=True)]
        found = own
        begin = begin + segment.longest
    k, v = (x.unflatten(2, tokens.shape[2:]).flatten(1, 2) for x in found)
    return k, v
