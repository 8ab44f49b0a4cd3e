"""What one decoded token reads, as a selection chose it.

Shapes: ``B`` sequences, ``H`` query heads, ``n`` KV heads, ``M`` entries that a list has room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layout.blocks import BlockList
from ..layout.segments import Listed, Segment


@dataclass(eq=False)
class Chosen:
    """What a query reads: the entries before ``low``, listed ones, and everything from entry ``high`` on.

        entries   0 .. low-1     low ............ high-1      high .. the query's own
                  | sinks |      | * |   | * | * |   |        |   recent   |
                                   listed, ascending

    Attributes:
        size: tokens of an entry.
        entries: int32 ``[B, n, M]`` (or ``[B, H, M]``), ascending; what stands after the counts is ignored.
        counts: how many there are, ``[B, n]``; None: M.
        estimate: stands for what is skipped: a segment that every query reads as well.
        note: what the report says of it; None for nothing.
        skipped: what of it is remembered, from which `Select.again` makes the estimate; tensors ``[B, ...]``.
        whole: the query that chooses reads everything; those that use the choice again read what it lists.
    """

    size: int
    low: int
    high: int
    entries: Tensor
    counts: Tensor | None = None
    estimate: Segment | None = None
    note: str | None = None
    skipped: tuple[Tensor, ...] = ()
    whole: bool = False

    def blocks(self, position: int) -> BlockList:
        """The list of the query at ``position``."""
        own = position // self.size
        if self.whole:
            none = self.entries[:, :, :0]
            return replace(self, low=own + 1, high=own + 1, entries=none, counts=None, whole=False).blocks(position)
        batch, heads, width = self.entries.shape
        device = self.entries.device
        sinks = torch.arange(self.low, dtype=torch.int32, device=device).expand(batch, heads, -1)
        recent = torch.arange(self.high, own + 1, dtype=torch.int32, device=device).expand(batch, heads, -1)
        more = self.low + own + 1 - self.high
        if self.counts is None:
            indices = torch.cat([sinks, self.entries, recent], 2)
            counts = torch.full((batch, heads), width + more, dtype=torch.int32, device=device)
        else:
            given = torch.arange(width, device=device) < self.counts[..., None]
            listed = self.entries.masked_fill(~given, own + 1)  # after everything that is read
            indices = torch.cat([sinks, listed, recent], 2).sort(-1).values
            counts = (self.counts + more).int()
            indices = indices.masked_fill(indices > own, 0)
        none = counts.new_zeros(batch, heads, 0)
        zero = counts.new_zeros(batch, heads)
        return BlockList(self.size, position, position + 1, indices[:, :, None], counts[:, :, None], none, zero)

    @property
    def listed(self) -> Listed | None:
        """The same for a kernel that reads one segment; None: all of it."""
        if self.whole:
            return None
        counts = None if self.counts is None else self.counts.contiguous()
        return Listed(self.size, self.low, self.high, self.entries.contiguous(), counts)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> Chosen:
        """See `Index.map_rows`; of what is remembered, which has no estimate."""
        counts = None if self.counts is None else change(self.counts)
        skipped = tuple(change(x) for x in self.skipped)
        return replace(self, entries=change(self.entries), counts=counts, skipped=skipped)

    def counted(self, position: int) -> tuple[Tensor | int, int, int]:
        """Of the query at ``position``, summed over sequences and lists: tokens it reads and has, and the sequences."""
        batch, lists, width = self.entries.shape
        every = batch * lists * (position + 1)
        if self.whole:
            return every, every, batch
        outside = self.low * self.size + position + 1 - self.high * self.size
        chosen = batch * lists * width if self.counts is None else self.counts.sum()
        return batch * lists * outside + chosen * self.size, every, batch

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that it keeps alive while it is remembered."""
        yield self.entries
        if self.counts is not None:
            yield self.counts
        yield from self.skipped
