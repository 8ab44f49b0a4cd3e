"""Keys and values of two neighbouring layers that share their directions: what a store of pairs has cached of one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .segments import one_row, repeats
from .streamed import Piece

KIND = "merged"  # what `Streamed.kind` says of it
PREFILL_NOTE = "sparse prefill: what a paired store kept was restored as a whole, layer by layer, to choose from it"
TENSORS = ("unit", "at", "norm", "exact")  # of keys, and of values


class Directions:
    """What both layers of a pair have in common, of keys or of values; never changed.

    Attributes:
        unit: shared directions, ``[B, n, S, D]``.
        at: slots that each layer keeps exactly, int64 ``[B, n, R]``, ascending; a head with fewer has ones after the
            last slot.
    """

    def __init__(self, unit: Tensor, at: Tensor):
        self.unit = unit
        self.at = at
        self._mapped: tuple[Any, Any] | None = None

    def map_rows(self, change: Callable[[Tensor], Tensor], own: Callable[[Tensor], Tensor]) -> Directions:
        """What ``own`` makes of it, for ``change``: the same for both layers, which are mapped one after the other."""
        if self._mapped is not None and self._mapped[0] is change and (found := self._mapped[1]()) is not None:
            return found
        found = Directions(own(self.unit), own(self.at))
        self._mapped = (change, weakref.ref(found))
        return found

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_mapped": None}


@dataclass
class Half:
    """The keys or the values of one layer.

    Attributes:
        common: what the other layer has as well.
        norm: length of each, ``[B, n, S]``.
        exact: those at the slots ``common.at``, ``[B, n, R, D]``.
        first: slot of the pair that is slot 0 here.
    """

    common: Directions
    norm: Tensor
    exact: Tensor
    first: int = 0

    def tensors(self) -> tuple[Tensor, ...]:
        return self.common.unit, self.common.at, self.norm, self.exact

    def alone(self, rows: slice, low: int) -> Half:
        """Of these sequences from slot ``low`` on."""
        common = Directions(self.common.unit[rows, :, low:], self.common.at[rows])
        return Half(common, self.norm[rows, :, low:], self.exact[rows], self.first + low)

    def places(self, low: int, high: int) -> Tensor:
        """Where in the slots ``low .. high`` those of ``exact`` are, int64 ``[B, n, R]``; elsewhere: after the last."""
        at = self.common.at - self.first - low
        return at.masked_fill((at < 0) | (at >= high - low), high - low)

    def span(self, low: int, high: int) -> Tensor:
        """``[B, n, high - low, D]``."""
        unit = self.common.unit[:, :, low:high]
        room = unit.new_empty(*unit.shape[:2], high - low + 1, unit.shape[3])  # one more for what is elsewhere
        torch.mul(unit, self.norm[:, :, low:high, None], out=room[:, :, : high - low])
        at = self.places(low, high)
        room.scatter_(2, at[..., None].expand_as(self.exact), self.exact)
        return room[:, :, : high - low]

    def take(self, slots: Tensor) -> Tensor:
        """``[B, n, W, D]`` at ``slots [B, n, W]``."""
        dim = self.exact.shape[3]
        found = self.common.unit.gather(2, slots[..., None].expand(-1, -1, -1, dim))
        found *= self.norm.gather(2, slots)[..., None]
        if not self.exact.shape[2]:
            return found
        at = self.common.at.contiguous()
        slots = (slots + self.first).contiguous()
        place = torch.searchsorted(at, slots).clamp_(max=at.shape[2] - 1)
        exact = self.exact.gather(2, place[..., None].expand(-1, -1, -1, dim))
        return torch.where((at.gather(2, place) == slots)[..., None], exact, found)

    def mapped(self, change: Callable[[Tensor], Tensor], common: Directions) -> Half:
        return Half(common, change(self.norm), change(self.exact), self.first)


@dataclass
class Merged(Piece):
    """Slots of one layer of a pair. A reader gets each direction times the layer's own length.

    Attributes:
        k, v: keys and values.
        shared, hidden: see `Piece`.
    """

    saved_as: ClassVar[str] = "Merged"
    kind: ClassVar[str] = KIND
    joined_note: ClassVar[str] = PREFILL_NOTE

    k: Half
    v: Half
    shared: bool = False
    hidden: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.k.norm.dtype

    @property
    def length(self) -> int:
        return self.k.norm.shape[2]

    @property
    def form(self) -> tuple[int, int, int]:
        return *self.k.norm.shape[:2], self.k.exact.shape[3]

    def alone(self, rows: slice, low: int) -> Merged:
        return replace(self, k=self.k.alone(rows, low), v=self.v.alone(rows, low), hidden=None)

    def span(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        return self.k.span(low, high), self.v.span(low, high)

    def take(self, slots: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.k.take(slots), self.v.take(slots)

    def tensors(self) -> Iterator[Tensor]:
        yield from (*self.k.tensors(), *self.v.tensors())

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Sequences that come from one go on sharing its memory, and so do the layers."""
        own = repeats(self.k.norm, change) if one_row(self.k.norm) else change
        self.k, self.v = (half.mapped(own, half.common.map_rows(change, own)) for half in (self.k, self.v))

    def copy(self) -> Merged:
        return replace(self)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The file has the directions of a pair twice, once for each layer."""
        rows = slice(0, 1) if self.k.norm.stride(0) == 0 else slice(None)  # as of a `Segment`
        pairs = (
            (f"{part}_{name}", x[rows])
            for part, half in (("k", self.k), ("v", self.v))
            for name, x in zip(TENSORS, half.tensors(), strict=True)
        )
        return dict(pairs), {"rows": self.k.norm.shape[0], "shared": int(self.shared)}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, int], device: torch.device) -> Merged:
        halves = []
        for part in ("k", "v"):
            own = (tensors[f"{part}_{name}"].to(device, copy=True) for name in TENSORS)
            unit, at, norm, exact = (x.expand(numbers["rows"], *x.shape[1:]) if x.shape[0] == 1 else x for x in own)
            halves.append(Half(Directions(unit, at), norm, exact))
        return cls(*halves, bool(numbers["shared"]))
