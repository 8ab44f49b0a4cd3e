"""Kept keys and values that can be read only block by block: packed, in another memory, or on a disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from . import cpu
from .layout import Segment
from .reference import merge

NAME = "streamed"  # what the report calls it


class Streamed(ABC):
    """Takes the place of a `Segment` in `HeadKV.segments`; the queries never lie in it, so all of them see all of it.

    Attributes:
        dtype: of the plain blocks.
        bias: none, as of a segment whose scores get nothing added.
    """

    dtype: torch.dtype
    bias: ClassVar[None] = None

    @abstractmethod
    def blocks(self) -> Iterator[Segment]:
        """Plain segments that together are the kept tokens in their order. Asking for the next may end the last."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """Every tensor it keeps alive."""

    @abstractmethod
    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or select the rows: ``change`` does it to a tensor ``[B, ...]``."""

    @abstractmethod
    def copy(self) -> Streamed:
        """One with the same tokens that can go on by itself; what is never written again may be shared."""

    @abstractmethod
    def saved(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """What `restored` needs: tensors without memory that nobody wrote, views where possible, and plain numbers."""

    @classmethod
    @abstractmethod
    def restored(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, int], device: torch.device) -> Streamed:
        """The one of which `saved` gave ``tensors`` and ``numbers``, with memory of its own.

        Args:
            tensors: views of a file on the CPU, to be copied to wherever this keeps them.
            device: that of the layer.
        """

    def kept(self) -> tuple[Tensor, Tensor]:
        """All of it at once, k, v ``[B, n, S, D]``: what a prefill pattern needs, which chooses among all keys."""
        keys, values = zip(*([part.clone() for part in block.kept()] for block in self.blocks()), strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)


def attention(q: Tensor, segments: list[Segment | Streamed], scale: float) -> Tensor:
    """Attention ``[B, H, T, D]`` whose queries are the last T tokens of the last segment, one block at a time.

    With T > 1 that segment is a plain one. Blocks are merged by logsumexp in float32 or wider.
    """
    *past, own = segments
    merged = None
    for segment in past if q.shape[2] > 1 else segments:
        for block in segment.blocks() if isinstance(segment, Streamed) else (segment,):
            merged = _with(merged, cpu.with_lse(q, block, scale))
    if q.shape[2] > 1:
        merged = _with(merged, cpu.with_lse(q, own, scale, causal=True))
    return merged[0].to(q.dtype)


def _with(merged: tuple[Tensor, Tensor] | None, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    out, lse = part
    part = (out.to(lse.dtype), lse)  # rounded to a low precision after each block, the error would add up
    return part if merged is None else merge([merged, part])
