"""The one interface between caches and kernels: what a role's KV heads keep, as segments, and which blocks are read.

Shapes: ``B`` batch, ``n`` KV heads of one role, ``G`` query heads per KV head, ``T`` tokens of this forward, ``S``
tokens kept, ``D`` head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

TEMPORARY = 1 << 22  # numbers per temporary of a BlockList's methods


@dataclass(frozen=True)
class RoleHeads:
    """The KV heads of one layer that share a role.

    Attributes:
        role: ``"retrieval"`` or ``"streaming"``.
        kv_heads: their indices, ascending.
        total: KV heads of the layer (on this process, under tensor parallel).
    """

    role: str
    kv_heads: tuple[int, ...]
    total: int

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """``kv_heads`` as ranges, so that heads are taken by slices and never by an index that lives on a device."""
        runs: list[tuple[int, int]] = []
        for head in self.kv_heads:
            if runs and runs[-1][1] == head:
                runs[-1] = (runs[-1][0], head + 1)
            else:
                runs.append((head, head + 1))
        return tuple(runs)

    def take(self, x: Tensor, group: int = 1) -> Tensor:
        """These heads of ``x [B, total * group, ...]``: a view where they are neighbours, else a copy."""
        parts = [x[:, a * group : b * group] for a, b in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def copy_to(self, into: Tensor, x: Tensor) -> None:
        """Write these heads of ``x [B, total, ...]`` into ``into [B, len(kv_heads), ...]``, without a gradient."""
        done = 0
        for a, b in self.runs:
            into[:, done : done + b - a].copy_(x[:, a:b].detach())
            done += b - a


@dataclass
class Segment:
    """Keys and values of consecutive kept tokens. Growing buffers, rings, pages and shared prefixes are all segments.

    Attributes:
        k: keys ``[B, n, capacity, D]``; slots from ``length`` on are uninitialised memory.
        v: values ``[B, n, capacity, D_v]``.
        length: tokens kept, in every row (int) or row by row (int64 ``[B]``).
        bias: added to the scores of these keys before the softmax, broadcastable to ``[B, n, 1, length]``.
        shared: the memory belongs to another cache as well, so a writer must copy it first.
    """

    k: Tensor
    v: Tensor
    length: int | Tensor
    bias: Tensor | None = None
    shared: bool = False

    @property
    def longest(self) -> int:
        """Slots that a reader must look at: ``length``, or the whole capacity where rows differ."""
        return self.length if isinstance(self.length, int) else self.k.shape[2]

    def kept(self) -> tuple[Tensor, Tensor]:
        """Views of the filled slots: k, v ``[B, n, longest, D]``."""
        return self.k[:, :, : self.longest], self.v[:, :, : self.longest]


@dataclass
class HeadKV:
    """What the KV heads of one role offer the queries of this forward.

    Attributes:
        heads: which heads these are.
        segments: in decode (one query token) every key of every segment is visible, but for slots past a row's
            length. With several query tokens the queries are the last ``T`` tokens of the last segment.
        sinks: with several query tokens, for stores with a gap after the first tokens: the segment of those first
            tokens of each row, which ``segments`` then leaves out.
        first: row position of the first key of ``segments[0]`` (0 when nothing was dropped or held in ``sinks``).
        store: the spec of the store, which knows its visibility rule.
        state: tensors a decode selector keeps between steps.
    """

    heads: RoleHeads
    segments: list[Segment]
    store: object
    sinks: Segment | None = None
    first: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)


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

        Key blocks that lie after their query block are left out. Costs one read of the device, for the two widths.
        """
        i = torch.arange(first // block, first // block + block_mask.shape[2], device=block_mask.device)[:, None]
        block_mask = block_mask & (torch.arange(block_mask.shape[3], device=block_mask.device) <= i)
        if column_mask is None:
            column_mask = block_mask.new_zeros(*block_mask.shape[:2], kv_len)
        counts, column_counts = (mask.sum(-1, dtype=torch.int32) for mask in (block_mask, column_mask))
        widths = torch.stack([counts.max(), column_counts.max()]).tolist()
        indices, columns = (_places(mask, n) for mask, n in zip((block_mask, column_mask), widths, strict=True))
        return cls(block, first, kv_len, indices, counts, columns, column_counts)

    @property
    def key_blocks(self) -> int:
        return -(-self.kv_len // self.block)

    def block_mask(self, heads: slice = slice(None), query_blocks: slice = slice(None)) -> Tensor:
        """Bool ``[B, H, NQ, NK]``: the listed blocks, of these heads and query blocks."""
        indices, counts = self.indices[:, heads, query_blocks], self.counts[:, heads, query_blocks]
        return _mask_of(indices, counts, self.key_blocks)

    def column_mask(self, heads: slice = slice(None)) -> Tensor:
        """Bool ``[B, H, kv_len]``: the columns of these heads."""
        return _mask_of(self.columns[:, heads], self.column_counts[:, heads], self.kv_len)

    def visible(self, low: int = 0, high: int | None = None, heads: slice = slice(None)) -> Tensor:
        """Bool ``[B, H, high - low, kv_len]``: the keys that the queries ``low .. high`` of the chunk read. Slow."""
        high, device = self.kv_len - self.first if high is None else high, self.indices.device
        i = torch.arange(self.first + low, self.first + high, device=device)
        j = torch.arange(self.kv_len, device=device)
        begin, end = (self.first + low) // self.block, (self.first + high - 1) // self.block + 1
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
        batch, heads, query_blocks, _ = self.indices.shape
        j = torch.arange(self.key_blocks, device=self.indices.device)
        before = j < torch.arange(query_blocks, device=j.device)[:, None] + self.first // self.block
        total = self.counts.sum((0, 2)) * self.block
        step = max(1, TEMPORARY // (batch * max(query_blocks, self.block) * self.key_blocks))
        for low in range(0, heads if self.columns.shape[2] else 0, step):
            some = slice(low, low + step)
            columns = nn.functional.pad(self.column_mask(some), (0, -self.kv_len % self.block))
            per_block = columns.unflatten(-1, (-1, self.block)).sum(-1)[:, :, None]
            total[some] += per_block.masked_fill(self.block_mask(some) | ~before, 0).sum((0, 2, 3))
        return total

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
        blocks, columns = (mask.unflatten(1, (-1, group)).any(2) for mask in (self.block_mask(), self.column_mask()))
        return self.from_mask(blocks, columns, block=self.block, first=self.first, kv_len=self.kv_len)


def _places(mask: Tensor, width: int) -> Tensor:
    """Where ``mask [..., N]`` is True, ascending: int32 ``[..., width]``, 0 after the last."""
    flat, places = mask.flatten(0, -2), torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    out = torch.zeros(flat.shape[0], width, dtype=torch.int32, device=mask.device)
    step = max(1, TEMPORARY // mask.shape[-1])
    for low in range(0, flat.shape[0], step):
        piece = flat[low : low + step]
        slots = (piece.cumsum(-1) - 1).masked_fill(~piece, width)  # one more slot takes what is False
        room = out.new_zeros(piece.shape[0], width + 1).scatter_(1, slots, places.expand_as(piece))
        out[low : low + step] = room[:, :width]
    return out.unflatten(0, mask.shape[:-1])


def _mask_of(places: Tensor, counts: Tensor, size: int) -> Tensor:
    """The inverse of ``_places``: bool ``[..., size]``."""
    given = torch.arange(places.shape[-1], device=places.device) < counts[..., None]
    mask = torch.zeros(*places.shape[:-1], size + 1, dtype=torch.bool, device=places.device)
    return mask.scatter_(-1, places.long().masked_fill(~given, size), True)[..., :size]


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient must flow through one of them."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype torch.autocast would give them, as SDPA does by itself; unchanged without autocast.

    Under autocast a model's rotated q and k are float32 while its v is not.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
