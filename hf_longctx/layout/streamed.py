"""Keys and values that are read block by block: never in one piece on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .segments import Segment

BLOCK = 1 << 20  # numbers of the keys of a block of a `Piece`, at most, but for a single token


class Streamed(ABC):
    """Takes the place of a `Segment` in `HeadKV.segments`; the queries never lie in it, so all of them see all of it.

    Attributes:
        dtype: of the plain blocks.
        bias, bias_of_pads: none, as of a segment whose scores get nothing added.
        note: what the report says where it is read; None for nothing.
    """

    dtype: torch.dtype
    bias: ClassVar[None] = None
    bias_of_pads: ClassVar[bool] = False
    note: str | None = None

    @property
    @abstractmethod
    def kind(self) -> Hashable:
        """What a kernel must know of it to say whether it reads it as it is."""

    @property
    @abstractmethod
    def joined_note(self) -> str:
        """What the report says where a prefill pattern needs all of it at once (`contents`)."""

    def lying(self, slots: Tensor) -> list[Segment] | None:
        """Plain segments, together all tokens in order, in the memory where they lie; None where that cannot be.

        Only what holds one of ``slots`` (int64, any shape) may be read; the rest is room without contents.
        """
        return None

    @abstractmethod
    def blocks(self) -> Iterator[Segment]:
        """Plain segments, together the cached tokens in order. One is only valid until the next is requested."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """Every tensor it keeps alive."""

    @property
    def longest(self) -> int:
        """Tokens of the sequence that has most."""
        return sum(block.longest for block in self.blocks())

    @property
    def form(self) -> tuple[int, int, int]:
        """Sequences, KV heads, head_dim of the keys."""
        k = next(self.blocks()).k
        return k.shape[0], k.shape[1], k.shape[3]

    def span(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """k, v ``[B, n, high - low, D]`` of the slots ``low .. high``. Slow, unless a class says it better."""
        return tuple(x[:, :, low:high] for x in self.contents())

    def take(self, slots: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """k, v ``[B, n, W, D]`` of the slots ``slots [B, n, W]`` (int64): a selection's.

        Slow; a class says it better that fetches or unpacks no others.

        Args:
            wanted: bool like ``slots``, what may be anything where it is False; None: all are wanted.
        """
        return tuple(x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[3])) for x in self.contents())

    def contents(self) -> tuple[Tensor, Tensor]:
        """All of it at once, k, v ``[B, n, S, D]``: what a prefill pattern needs, which chooses among all keys."""
        keys, values = zip(*([part.clone() for part in block.contents()] for block in self.blocks()), strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)


class Stored(Streamed):
    """One that a store owns: it follows the sequences of its cache, is forked and saved with it.

    Attributes:
        saved_as: its word in a cache's file.
    """

    saved_as: ClassVar[str]

    @abstractmethod
    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or select the rows: ``change`` does it to a tensor ``[B, ...]``."""

    @abstractmethod
    def copy(self) -> Stored:
        """One with the same tokens that can go on by itself; what is never written again may be shared."""

    @abstractmethod
    def saved(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """What `restored` needs: tensors without memory that nobody wrote, views where possible, and plain numbers."""

    @classmethod
    @abstractmethod
    def restored(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, int], device: torch.device) -> Stored:
        """The one of which `saved` gave ``tensors`` and ``numbers``, with memory of its own.

        Args:
            tensors: views of a file on the CPU, to be copied to wherever this keeps them.
            device: that of the layer.
        """


class Piece(Stored):
    """Consecutive slots of the batch, pads included, to which nobody writes any more.

    Attributes:
        shared: other caches may read the memory.
        hidden: score bias ``[B, 1, 1, S]`` that hides pads from one query, and does nothing else; None: nothing.
    """

    shared: bool = False
    hidden: Tensor | None = None

    @property
    @abstractmethod
    def length(self) -> int:
        """Slots."""

    @property
    def longest(self) -> int:
        return self.length

    @abstractmethod
    def alone(self, rows: slice, low: int) -> Piece:
        """That of these sequences from slot ``low`` on, for a reader that sees all of it."""

    @abstractmethod
    def span(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """k, v ``[B, n, high - low, D]`` of the slots ``low .. high``."""

    def blocks(self) -> Iterator[Segment]:
        batch, heads, dim = self.form
        step = max(1, BLOCK // max(1, batch * heads * dim))
        for low in range(0, self.length, step):
            high = min(low + step, self.length)
            bias = None if self.hidden is None else self.hidden[..., low:high]
            yield Segment(*self.span(low, high), high - low, bias, bias_of_pads=True)

    def contents(self) -> tuple[Tensor, Tensor]:
        return self.span(0, self.length)
