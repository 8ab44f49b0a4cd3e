"""Keys of which every KV head has some channels alone, and their values: what a store of thinned keys has cached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .segments import one_row, repeats
from .streamed import Piece

KIND = "thinned"  # what `Streamed.kind` says of it
PREFILL_NOTE = "sparse prefill: keys of a thin store got zeros for the channels they lost, layer by layer, to choose"


@dataclass
class Thinned(Piece):
    """Slots whose keys have some channels alone.

    A reader that takes whole keys gets zeros for the channels that are gone: the same scores.

    Attributes:
        k: keys ``[B, n, S, D']``.
        v: values ``[B, n, S, D_v]``.
        channels: which channels of a whole key these are, int64 ``[B, n, D']``, ascending.
        dim: D, channels of a whole key.
        shared, hidden: see `Piece`.
    """

    saved_as: ClassVar[str] = "Thinned"
    kind: ClassVar[str] = KIND
    joined_note: ClassVar[str] = PREFILL_NOTE

    k: Tensor
    v: Tensor
    channels: Tensor
    dim: int
    shared: bool = False
    hidden: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    @property
    def length(self) -> int:
        return self.k.shape[2]

    @property
    def form(self) -> tuple[int, int, int]:
        return *self.k.shape[:2], self.dim

    def alone(self, rows: slice, low: int) -> Thinned:
        k, v = (x[rows, :, low:] for x in (self.k, self.v))
        return replace(self, k=k, v=v, channels=self.channels[rows], hidden=None)

    def widened(self, k: Tensor) -> Tensor:
        """Whole keys ``[B, n, W, D]`` of ``k [B, n, W, D']``."""
        whole = k.new_zeros(*k.shape[:3], self.dim)
        return whole.scatter_(3, self.channels[:, :, None].expand_as(k), k)

    def span(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        return self.widened(self.k[:, :, low:high]), self.v[:, :, low:high]

    def take(self, slots: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        k, v = (x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[3])) for x in (self.k, self.v))
        return self.widened(k), v

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.k, self.v, self.channels)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Sequences that come from one go on sharing its memory."""
        own = repeats(self.k, change) if one_row(self.k) else change
        self.k, self.v, self.channels = (own(x) for x in self.tensors())

    def copy(self) -> Thinned:
        return replace(self)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        rows = slice(0, 1) if self.k.stride(0) == 0 else slice(None)  # rows that share their memory are kept once
        tensors = dict(zip(("k", "v", "channels"), (x[rows] for x in self.tensors()), strict=True))
        return tensors, {"rows": self.k.shape[0], "dim": self.dim, "shared": int(self.shared)}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, int], device: torch.device) -> Thinned:
        made = (tensors[name].to(device, copy=True) for name in ("k", "v", "channels"))
        made = (x.expand(numbers["rows"], *x.shape[1:]) if x.shape[0] < numbers["rows"] else x for x in made)
        return cls(*made, numbers["dim"], bool(numbers["shared"]))
