"""A tensor that grows by whole entries; what it had when a cache was forked is shared, and never written again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..layout.huge_pages import in_huge_pages
from ..layout.segments import fitting

SPARE = 16  # entries by which a buffer grows at least


def room(entries: int, most: int | None = None) -> int:
    """Entries that a buffer of so many has room for, however it grew: steps of an eighth, and of `SPARE` at least.

    Args:
        most: entries that there will ever be: room for them is made at once.
    """
    if most is not None:
        return max(entries, most)
    size = 0
    while size < entries:
        size += max(SPARE, size // 8)
    return size


class Growing:
    """Entries ``[B, n, N, W]``, in parts that follow one another.

        shared  |####|######|    own  |####....|
        entries  0 ..            ..  length

    Attributes:
        length: entries in all.
    """

    def __init__(self) -> None:
        self.shared: list[Tensor] = []
        self.own: Tensor | None = None
        self.length = 0

    @property
    def _before(self) -> int:
        return sum(part.shape[2] for part in self.shared)

    def append(self, entries: Tensor, more: int = 0, most: int | None = None) -> None:
        """``entries [B, n, N, W]`` after those there are.

        Args:
            more: entries that follow at once, for which there is room then.
            most: as for `room`.
        """
        before = self._before
        used = self.length - before
        needed = used + entries.shape[2]
        capacity = room(needed + more, None if most is None else most - before)
        if self.own is None or not needed <= self.own.shape[2] <= capacity:  # more: it was cropped
            with torch.inference_mode(False):  # so that the cache can be continued outside of inference mode
                grown = in_huge_pages(entries.new_empty(*entries.shape[:2], capacity, entries.shape[3]))
            if used:
                grown[:, :, :used] = self.own[:, :, :used]
            self.own = grown
        self.own[:, :, used:needed] = entries
        self.length = before + needed

    def views(self, low: int = 0, high: int | None = None) -> list[Tensor]:
        """The entries ``low .. high``, in order, each part as it lies."""
        high = self.length if high is None else high
        found = []
        begin = 0
        own = [] if self.own is None else [self.own[:, :, : self.length - self._before]]
        for part in (*self.shared, *own):
            end = begin + part.shape[2]
            if begin < high and low < end:
                found.append(part[:, :, max(low, begin) - begin : min(high, end) - begin])
            begin = end
        return found

    def take(self, at: Tensor) -> Tensor:
        """Copies of the entries ``at [B, n, M]``, int64: ``[B, n, M, W]``."""
        rows, heads = (torch.arange(size, device=at.device) for size in at.shape[:2])
        rows, heads = rows[:, None, None], heads[:, None]
        found = None
        begin = 0
        for part in self.views():
            size = part.shape[2]
            own = part[rows, heads, (at - begin).clamp(0, size - 1)]
            found = own if found is None else torch.where((at >= begin)[..., None], own, found)
            begin += size
        return found

    def crop(self, length: int) -> None:
        """Keep the first ``length`` entries."""
        if length >= self.length:
            return
        self.length = length
        left = []
        for part in self.shared:
            if length > 0:
                left.append(_cut(part, length, 1) if length < part.shape[2] else part)
            length -= part.shape[2]
        if length <= 0:
            self.own = None
        elif self.own.shape[2] > 2 * (length + SPARE):
            self.own = _cut(self.own, length, 1)
        self.shared = left

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """``change`` reorders, repeats or selects the rows of a tensor ``[B, ...]``; rows of one memory stay so."""
        self.shared = [map_shared(part, change) for part in self.shared]
        if self.own is not None:
            with torch.inference_mode(False):
                self.own = change(self.own)

    def fork(self) -> Growing:
        """One with the same entries; both write what comes next to memory of their own.

        A few entries are copied, so that many forks do not leave many small parts.
        """
        own, shared = self.own, self.shared  # in this order: several threads may fork one
        before = sum(part.shape[2] for part in shared)
        used = self.length - before
        if used > max(SPARE, before // 8):
            self.shared = shared = [*shared, _cut(own, used, 1 / 8)]
            self.own = own = None
        other = Growing()
        other.shared, other.length = list(shared), self.length
        if own is not None and used:
            with torch.inference_mode(False):
                other.own = own[:, :, :used].clone()
        return other

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor it keeps alive."""
        yield from self.shared
        if self.own is not None:
            yield self.own


def map_shared(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """``change(tensor)`` of a tensor ``[B, ...]`` that nobody writes: rows of one memory stay so."""
    if tensor.shape[0] == 1 or tensor.stride(0) == 0:
        return tensor[:1].expand(change(tensor[:, :0]).shape[0], *tensor.shape[1:])
    with torch.inference_mode(False):
        return change(tensor)


def _cut(part: Tensor, length: int, spare: float) -> Tensor:
    """Its first ``length`` entries, in memory that fits; rows of one memory stay so."""
    rows = slice(0, 1) if part.stride(0) == 0 else slice(None)
    return fitting(part[rows, :, :length], spare).expand(part.shape[0], -1, -1, -1)
