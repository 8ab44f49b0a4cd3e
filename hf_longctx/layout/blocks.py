"""Which key blocks and single keys each query block reads.

Shapes: ``B`` batch, ``H`` query heads or KV heads, ``NQ`` query blocks of the chunk, ``NK`` key blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .pieces import pieces

TEMPORARY = 1 << 20  # numbers per temporary of a BlockList's methods; a query block of all heads may take more


@dataclass(frozen=True, eq=False)
class BlockList:
    """Which keys each query block reads in one prefill call: listed key blocks, and single key tokens ("columns").

    The queries are the last ``kv_len - first`` of a row's ``kv_len`` tokens. Blocks are counted from the row's first
    real token, also those of queries: query block ``i`` holds the row positions ``[i * block, (i + 1) * block)``, so a
    chunk may begin and end inside a block. Query i reads key j of a listed block when j <= i. A column is read by every
    query block that does not list its block and begins after it.

    ``H`` is the number of query heads, or of KV heads where the query heads of a group share one list. ``NQ`` is the
    number of query blocks that the chunk touches. Integers are int32; what stands after the counts is 0.

    Attributes:
        block: tokens of a block.
        first: row position of the first query.
        kv_len: tokens of the row so far, those of the queries included.
        indices: the key blocks of each query block, ascending, ``[B, H, NQ, M]``.
        counts: how many there are, ``[B, H, NQ]``.
        columns: row positions of the columns, ascending, ``[B, H, n]``.
        column_counts: how many there are, ``[B, H]``.
    """

    block: int
    first: int
    kv_len: int
    indices: Tensor
    counts: Tensor
    columns: Tensor
    column_counts: Tensor

    @classmethod
    def from_mask(
        cls, block_mask: Tensor, column_mask: Tensor | None = None, *, block: int, first: int, kv_len: int
    ) -> BlockList:
        """The list of what is True in ``block_mask [B, H, NQ, NK]`` and ``column_mask [B, H, kv_len]`` (None: nothing).

        Key blocks that lie after their query block are left out.
        """
        batch, heads, query_blocks, key_blocks = block_mask.shape
        cut = pieces(query_blocks, batch * heads * key_blocks, TEMPORARY)
        parts = ((slice(0, heads), rows, block_mask[:, :, rows]) for rows in cut)
        return cls.from_parts(parts, column_mask, shape=(batch, heads), block=block, first=first, kv_len=kv_len)

    @classmethod
    def from_parts(
        cls,
        parts: Iterable[tuple[slice, slice, Tensor]],
        column_mask: Tensor | None = None,
        *,
        shape: tuple[int, int],
        block: int,
        first: int,
        kv_len: int,
    ) -> BlockList:
        """`from_mask` of a mask that never exists as a whole.

        Each part is (heads, query blocks of the chunk, block mask ``[B, h, N, NK]`` or the first of its key blocks);
        together they hold every head and query block of ``shape (B, H)`` once, in any order. Costs one read of the
        device per part, for its width.
        """
        found = []
        query_blocks = -(-kv_len // block) - first // block
        for heads, rows, mask in parts:
            own = torch.arange(rows.start, rows.stop, device=mask.device)[:, None] + first // block
            mask = mask & (torch.arange(mask.shape[3], device=mask.device) <= own)
            found.append((heads, rows, *_places(mask)))
        like = found[0][2]
        indices = like.new_zeros(*shape, query_blocks, max(places.shape[3] for _, _, places, _ in found))
        counts = like.new_zeros(*shape, query_blocks)
        while found:
            heads, rows, places, count = found.pop()
            indices[:, heads, rows, : places.shape[3]], counts[:, heads, rows] = places, count
        none = (like.new_zeros(*shape, 0), like.new_zeros(shape))
        columns, column_counts = none if column_mask is None else _places(column_mask)
        return cls(block, first, kv_len, indices, counts, columns, column_counts)

    @property
    def key_blocks(self) -> int:
        return -(-self.kv_len // self.block)

    def block_mask(self, heads: slice = slice(None), query_blocks: slice = slice(None)) -> Tensor:
        """Bool ``[B, H, NQ, NK]``: the listed blocks, of these heads and query blocks."""
        indices = self.indices[:, heads, query_blocks]
        counts = self.counts[:, heads, query_blocks]
        return _mask_of(indices, counts, self.key_blocks)

    def column_mask(self, heads: slice = slice(None)) -> Tensor:
        """Bool ``[B, H, kv_len]``: the columns of these heads."""
        return _mask_of(self.columns[:, heads], self.column_counts[:, heads], self.kv_len)

    def visible(self, low: int = 0, high: int | None = None, heads: slice = slice(None)) -> Tensor:
        """Bool ``[B, H, high - low, kv_len]``: the keys that the queries ``low .. high`` of the chunk read. Slow."""
        high = self.kv_len - self.first if high is None else high
        device = self.indices.device
        i = torch.arange(self.first + low, self.first + high, device=device)
        j = torch.arange(self.kv_len, device=device)
        begin = (self.first + low) // self.block
        end = (self.first + high - 1) // self.block + 1
        skipped = self.first // self.block
        listed = self.block_mask(heads, slice(begin - skipped, end - skipped))
        before = j < torch.arange(begin, end, device=device)[:, None] * self.block
        reads = listed.repeat_interleave(self.block, -1)[..., : self.kv_len]
        reads = reads | (self.column_mask(heads)[:, :, None] & before)
        return reads[:, :, i // self.block - begin] & (j <= i[:, None])

    @property
    def reads(self) -> Tensor:
        """Key tokens read, summed over rows, heads and query blocks (int64, on the device); a listed block is whole."""
        return self.reads_by_head.sum()

    @property
    def reads_by_head(self) -> Tensor:
        """``reads`` head by head, ``[H]``."""
        total, (batch, heads, query_blocks, width) = self.counts.sum((0, 2)) * self.block, self.indices.shape
        if not self.columns.shape[2]:
            return total
        # A column is read by every query block that begins after it, but for those that list its block.
        ordered = self.columns.masked_fill(~_given(self.columns, self.column_counts), self.kv_len)
        begins = torch.arange(self.key_blocks + 1, device=ordered.device, dtype=ordered.dtype) * self.block
        before = torch.searchsorted(ordered, begins.expand(batch, heads, -1).contiguous())
        past = torch.arange(query_blocks, device=ordered.device) + self.first // self.block
        per_block = before.diff()
        for rows in pieces(query_blocks, batch * heads * width, TEMPORARY):
            indices = self.indices[:, :, rows]
            listed = _given(indices, self.counts[:, :, rows]) & (indices < past[rows, None])
            inside = per_block.gather(2, indices.flatten(2).long()).view_as(indices)
            total -= inside.masked_fill_(~listed, 0).sum((0, 2, 3))
        return total + before[..., past].sum((0, 2))

    @property
    def causal(self) -> int:
        """What ``reads`` would be if every causal block were listed."""
        batch, heads, query_blocks, _ = self.indices.shape
        past = self.first // self.block
        return batch * heads * self.block * (query_blocks * past + query_blocks * (query_blocks + 1) // 2)

    @property
    def density(self) -> float:
        """Key blocks read over causal key blocks; a column that is read counts ``1 / block``. Reads the device."""
        return self.reads.item() / self.causal

    def share_groups(self, group: int) -> BlockList:
        """One list per ``group`` neighbouring heads, ``[B, H / group, ...]``: the union of theirs."""
        batch, heads, query_blocks, _ = self.indices.shape
        cut = pieces(query_blocks, batch * heads * self.key_blocks, TEMPORARY)
        masks = ((rows, self.block_mask(query_blocks=rows)) for rows in cut)
        parts = ((slice(0, heads // group), rows, mask.unflatten(1, (-1, group)).any(2)) for rows, mask in masks)
        columns = self.column_mask().unflatten(1, (-1, group)).any(2) if self.columns.shape[2] else None
        sizes = {"block": self.block, "first": self.first, "kv_len": self.kv_len}
        return self.from_parts(parts, columns, shape=(batch, heads // group), **sizes)


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``mask [..., N]`` is True, ascending, and how often: int32 ``[..., most]``, 0 after the last, ``[...]``.

    Reads the device once.
    """
    counts = mask.sum(-1, dtype=torch.int32)
    width = int(counts.max())
    flat = mask.flatten(0, -2)
    places = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    out = torch.zeros(flat.shape[0], width, dtype=torch.int32, device=mask.device)
    for rows in pieces(flat.shape[0], mask.shape[-1], TEMPORARY):
        piece = flat[rows]
        slots = (piece.cumsum(-1, dtype=torch.int32) - 1).masked_fill_(~piece, width)  # one more takes what is False
        room = out.new_zeros(piece.shape[0], width + 1).scatter_(1, slots.long(), places.expand_as(piece))
        out[rows] = room[:, :width]
    return out.unflatten(0, mask.shape[:-1]), counts


def _given(places: Tensor, counts: Tensor) -> Tensor:
    """Bool like ``places [..., M]``: what stands before ``counts [...]``."""
    return torch.arange(places.shape[-1], device=places.device) < counts[..., None]


def _mask_of(places: Tensor, counts: Tensor, size: int) -> Tensor:
    """The inverse of ``_places``: bool ``[..., size]``."""
    mask = torch.zeros(*places.shape[:-1], size + 1, dtype=torch.bool, device=places.device)
    return mask.scatter_(-1, places.long().masked_fill_(~_given(places, counts), size), True)[..., :size]
