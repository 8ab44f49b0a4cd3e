"""Keys of which each KV head keeps others (`Ragged`), for kernels that read plain segments: one call per KV head.

Shapes: ``B`` batch, ``H`` query heads, ``n`` KV heads, ``T`` queries, ``D`` head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..layout.ragged import KIND, Ragged
from ..layout.reads import All, Causal
from ..layout.segments import Segment
from ..layout.streamed import Streamed
from .reference import merge

RAGGED = frozenset({KIND})
READS = (All, Causal)
Part = tuple[Tensor, Tensor]


def reason(kinds: frozenset, reads: type, device: torch.device) -> str | None:
    """Why segments of these kinds, not all plain, are not read as they are; None where they are `Ragged` alone."""
    if kinds != RAGGED:
        return "reads plain segments and ragged ones alone"
    if reads not in READS:
        return f"reads no {reads.__name__} of ragged segments"
    return None if device.type == "cpu" else "reads ragged segments on the CPU alone: elsewhere they come in blocks"


def attend(
    q: Tensor,
    segments: Sequence[Segment | Streamed],
    one_head: Callable[[Tensor, Segment], Part],
    others: Callable[[list[Segment]], Part],
) -> Part:
    """(out ``[B, H, T, D_v]``, lse ``[B, H, T]``) over ragged segments, which come before the queries, and others.

    Args:
        one_head: (out, lse) of the queries of one sequence and KV head over all keys of a segment.
        others: those of all queries over the other segments, if there are any.
    """
    parts = [_ragged(q, one, one_head) for one in segments if isinstance(one, Ragged)]
    if plain := [one for one in segments if not isinstance(one, Ragged)]:
        parts.append(others(plain))
    out, lse = merge([(out.to(lse.dtype), lse) for out, lse in parts])  # rounded once
    return out.to(q.dtype), lse


def _ragged(q: Tensor, ragged: Ragged, one_head: Callable[[Tensor, Segment], Part]) -> Part:
    batch, kv_heads = ragged.lengths.shape
    group = q.shape[1] // kv_heads
    rows = []
    for row in range(batch):
        own = q[row : row + 1]
        heads = [one_head(own[:, n * group : (n + 1) * group], ragged.head(row, n)) for n in range(kv_heads)]
        rows.append([torch.cat(found, 1) for found in zip(*heads, strict=True)])
    out, lse = (torch.cat(found) for found in zip(*rows, strict=True))
    return out, lse
