"""Kept keys and values that can be read only block by block: packed, in another memory, or on a disk."""

from __future__ import annotations

from torch import Tensor

from ..layout.scores import Scores
from ..layout.segments import Segment
from ..layout.streamed import Streamed
from . import cpu
from .reference import merge

NAME = "streamed"  # what the report calls it


def attention(q: Tensor, segments: list[Segment | Streamed], scale: float) -> Tensor:
    """Attention ``[B, H, T, D]`` whose queries are the last T tokens of the last segment, one block at a time.

    With T > 1 that segment is a plain one. Blocks are merged by logsumexp in float32 or wider.
    """
    *past, own = segments
    merged = None
    for segment in past if q.shape[2] > 1 else segments:
        for block in segment.blocks() if isinstance(segment, Streamed) else (segment,):
            merged = _with(merged, cpu.with_lse(q, block, Scores(scale)))
    if q.shape[2] > 1:
        merged = _with(merged, cpu.with_lse(q, own, Scores(scale), causal=True))
    return merged[0].to(q.dtype)


def _with(merged: tuple[Tensor, Tensor] | None, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    out, lse = part
    part = (out.to(lse.dtype), lse)  # rounded to a low precision after each block, the error would add up
    return part if merged is None else merge([merged, part])
