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
from ..layout.gather import listed_tokens, take
from ..layout.pieces import pieces
from ..layout.segments import Segment

TEMPORARY = 1 << 20  # elements of gathered keys, unless the lists of one KV head name more

Attend = Callable[..., tuple[Tensor, Tensor]]  # (q, k, v, bias) -> (out, lse)


def attend(q: Tensor, segments: Sequence[Segment], blocks: BlockList, dense: Attend) -> tuple[Tensor, Tensor]:
    """(out ``[B, H, 1, D]``, lse ``[B, H, 1]``) of the query at the position ``blocks.first``, by ``dense``."""
    kv_heads = segments[0].k.shape[1]
    group = q.shape[1] // kv_heads
    lists = blocks.counts.shape[1] // kv_heads
    tokens, named = (x.unflatten(1, (kv_heads, lists)) for x in listed_tokens(blocks))
    width = tokens.shape[3] * q.shape[3]
    rows = []
    with torch.autocast(q.device.type, enabled=False):  # it would round the scores
        for row in pieces(q.shape[0], width, TEMPORARY):
            parts = []
            for heads in pieces(kv_heads, (row.stop - row.start) * lists * width, TEMPORARY):
                own = [Segment(one.k[row, heads], one.v[row, heads], one.length) for one in segments]
                k, v = (
                    x.unflatten(2, tokens.shape[2:]).flatten(1, 2) for x in take(own, tokens[row, heads].flatten(2))
                )
                bias = torch.zeros_like(named[row, heads], dtype=q.dtype).masked_fill_(~named[row, heads], -math.inf)
                own = q[row, heads.start * group : heads.stop * group]
                parts.append(dense(own, k, v, bias=bias.flatten(1, 2)[:, :, None]))
            rows.append([torch.cat(found, 1) for found in zip(*parts, strict=True)])
    out, lse = (torch.cat(found) for found in zip(*rows, strict=True))
    return out, lse
