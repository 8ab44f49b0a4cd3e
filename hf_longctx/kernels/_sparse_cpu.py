"""Block lists of the cpu kernel: three disjoint sets of keys per query block, joined by logsumexp.

Shapes as in `cpu.py`, and ``L`` lists per KV head (G, or 1 where its query heads share one), ``g = G // L`` query heads
per list, ``NB`` query blocks of ``rows`` queries.

- A query block's own block, the only one that the causal edge crosses: all query blocks in one call by the causal flag.
- The listed blocks before it, gathered. Query blocks of one KV head that list equally many go into one call, so that
  nothing is padded and nothing masked. Gathering takes about a twentieth of the time of the attention (measured), so
  runs of neighbouring blocks are gathered as well; only where many query blocks list everything, dense attention runs.
- The columns of a list, gathered once for all its query blocks; a mask of one row per query block hides those it may
  not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from ..layout.blocks import BlockList

# No temporary holds more than max(TEMPORARY, S * D) numbers, but for the outputs of a query block of a large group.
TEMPORARY = 1 << 20
GATHERED = 1 << 19  # numbers of gathered keys per call, unless one query block lists more
COLUMN_BLOCKS = 16  # query blocks per call over the columns: more would hide more columns of the first ones

Attend = Callable[..., tuple[Tensor, Tensor]]  # (q, k, v, bias=None, causal=False) -> (out, lse)


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, dense: Attend) -> tuple[Tensor, Tensor]:
    """(out ``[B, H, T, D]``, lse ``[B, H, T]``) over k, v ``[B, n, S, D]``, by ``dense`` where nothing is sparse."""
    (batch, heads, q_len, dim), kv_heads = q.shape, k.shape[1]
    group = heads // kv_heads
    lists = blocks.counts.shape[1] // kv_heads
    out = q.new_empty(batch, q_len, heads, v.shape[3]).transpose(1, 2)
    lse = q.new_empty(batch, heads, q_len, dtype=torch.promote_types(q.dtype, torch.float32))
    room = {}
    with torch.autocast(q.device.type, enabled=False):  # it would round the scores
        for row, head in product(range(batch), range(kv_heads)):
            mine = slice(head * group, (head + 1) * group)
            listed = slice(head * lists, (head + 1) * lists)
            names = ("indices", "counts", "columns", "column_counts")
            own = replace(blocks, **{name: getattr(blocks, name)[row : row + 1, listed] for name in names})
            reader = _Reader(k[row, head], v[row, head], own, dense, room)
            for low, high, rows in _pieces(blocks, q_len, max(1, TEMPORARY // (group * blocks.block * dim))):
                queries = q[row, mine, low:high].unflatten(1, (-1, rows)).transpose(0, 1)
                found = reader.read(queries.unflatten(1, (lists, -1)), blocks.first + low)
                for into, values in zip((out, lse), found, strict=True):
                    into = into[row, mine, low:high].unflatten(1, (-1, rows)).transpose(0, 1)
                    into.copy_(values.flatten(1, 2))
    return out, lse


def _pieces(blocks: BlockList, q_len: int, most: int) -> Iterator[tuple[int, int, int]]:
    """(low, high, rows): up to ``most`` query blocks of ``rows`` queries each; a chunk may cut the outer ones."""
    low = 0
    while low < q_len:
        rows = min(blocks.block - (blocks.first + low) % blocks.block, q_len - low)
        count = min(most, (q_len - low) // rows) if rows == blocks.block else 1
        yield low, low + count * rows, rows
        low += count * rows


@dataclass(frozen=True)
class _Reader:
    """What the query heads of one KV head of one row read.

    Attributes:
        k, v: ``[S, D]``.
        blocks: the lists, ``[1, L, ...]``.
        room: memory for gathered keys and values, handed on from call to call.
    """

    k: Tensor
    v: Tensor
    blocks: BlockList
    dense: Attend
    room: dict[str, Tensor]

    def read(self, q: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """(out, lse) of queries ``[NB, L, g, rows, D]`` from row position ``position`` on, float32 or wider.

        They are whole query blocks, or a part of one.
        """
        first = position // self.blocks.block
        begin = first - self.blocks.first // self.blocks.block
        indices, counts = (
            t[0, :, begin : begin + q.shape[0]].transpose(0, 1) for t in (self.blocks.indices, self.blocks.counts)
        )
        at = torch.arange(first, first + q.shape[0], device=q.device)[:, None]
        last = indices.gather(2, (counts - 1).clamp(min=0)[..., None].long())[..., 0] if indices.shape[2] else counts
        own = (counts > 0) & (last == at)
        q = q.contiguous()
        out, lse = self._own_blocks(q, position, own)
        full = (counts > at).all(0) & (q.shape[0] > 1)
        before = (counts - own.int()).masked_fill(full, 0)
        self._listed_before(*(t.flatten(0, 1) for t in (q, out, lse, indices, before)))
        for number in full.nonzero()[:, 0].tolist():
            self._everything(q[:, number], out[:, number], lse[:, number], position)
        if self.blocks.columns.shape[2]:
            for number, count in enumerate(self.blocks.column_counts[0].tolist()):
                columns = self.blocks.columns[0, number, :count].long()
                self._columns(*(t[:, number] for t in (q, out, lse)), columns, number, first)
        return out, lse

    def _own_blocks(self, q: Tensor, position: int, own: Tensor) -> tuple[Tensor, Tensor]:
        """(out, lse) of every query over its own block, 0 and -inf where ``own [NB, L]`` says it is not listed."""
        count, lists, _, rows, _ = q.shape
        begin = position - position % self.blocks.block
        end = position + count * rows
        k, v = (t[begin:end].unflatten(0, (count, -1))[:, None] for t in (self.k, self.v))
        out, lse = self.dense(q.flatten(1, 2), k, v, causal=True)
        out, lse = (t.to(lse.dtype).contiguous().unflatten(1, (lists, -1)) for t in (out, lse))
        if not own.all():
            out.masked_fill_(~own[:, :, None, None, None], 0)
            lse.masked_fill_(~own[:, :, None, None], float("-inf"))
        return out, lse

    def _listed_before(self, q: Tensor, out: Tensor, lse: Tensor, indices: Tensor, counts: Tensor) -> None:
        """Join the first ``counts [N]`` blocks of ``indices [N, M]`` to (out, lse) of q ``[N, g, rows, D]``."""
        for width, at in _equal(counts, GATHERED // (self.blocks.block * q.shape[3])):
            listed = indices.index_select(0, at)[:, :width].flatten()
            k, v = (self._gather(name, listed, len(at)) for name in "kv")
            part = self.dense(q.index_select(0, at), k, v)
            joined = _join((out.index_select(0, at), lse.index_select(0, at)), part)
            for into, values in zip((out, lse), joined, strict=True):
                into.index_copy_(0, at, values)

    @cached_property
    def _whole(self) -> dict[str, Tensor]:
        """The whole blocks of k and v, ``[S // block, block * D]``: views, or copies where a token's D are not next
        to those of the token before it.
        """
        size = self.k.shape[0] // self.blocks.block
        pairs = {"k": self.k, "v": self.v}
        return {
            name: t[: size * self.blocks.block].reshape(size, self.blocks.block * t.shape[1])
            for name, t in pairs.items()
        }

    def _gather(self, name: str, listed: Tensor, count: int) -> Tensor:
        """The whole blocks ``listed [count * width]`` of k or v, ``[count, 1, width * block, D]``."""
        source = self._whole[name]
        size = len(listed) * source.shape[1]
        if name not in self.room or self.room[name].numel() < size:
            self.room[name] = source.new_empty(max(size, GATHERED))
        into = self.room[name][:size].view(-1, source.shape[1])
        return torch.index_select(source, 0, listed, out=into).view(count, 1, -1, source.shape[1] // self.blocks.block)

    def _everything(self, q: Tensor, out: Tensor, lse: Tensor, position: int) -> None:
        """Write dense attention of q ``[NB, g, rows, D]``: full tiles of queries, and nothing to gather."""
        queries = q.transpose(0, 1).flatten(1, 2)[None]
        k, v = (t[None, None, : position + queries.shape[2]] for t in (self.k, self.v))
        for into, values in zip((out, lse), self.dense(queries, k, v, causal=True), strict=True):
            into.copy_(values[0].unflatten(1, (q.shape[0], -1)).transpose(0, 1))

    def _columns(self, q: Tensor, out: Tensor, lse: Tensor, columns: Tensor, number: int, first: int) -> None:
        """Join the columns that list ``number`` reads to (out, lse) of its queries q ``[NB, g, rows, D]``.

        ``first`` is the first query block.
        """
        block = self.blocks.block
        skipped = first - self.blocks.first // self.blocks.block
        begins = torch.arange(first, first + q.shape[0], device=q.device) * block
        before = torch.searchsorted(columns, begins).tolist()  # how many lie before each query block
        k, v = (t.index_select(0, columns[: before[-1]]) for t in (self.k, self.v))
        step = max(1, min(COLUMN_BLOCKS, TEMPORARY // max(1, before[-1])))
        for low in range(0, q.shape[0], step):
            some = slice(low, min(low + step, q.shape[0]))
            seen = columns[: before[some.stop - 1]]
            listed = self.blocks.block_mask(slice(number, number + 1), slice(skipped + low, skipped + some.stop))[0, 0]
            hidden = listed[:, seen // block] | (seen >= begins[some, None])
            if hidden.all():
                continue
            bias = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, float("-inf"))[:, None, None]
            keys, values = (t[None, None, : len(seen)].expand(len(hidden), -1, -1, -1) for t in (k, v))
            part = self.dense(q[some], keys, values, bias=bias)
            out[some], lse[some] = _join((out[some], lse[some]), part)


def _equal(counts: Tensor, most: int) -> Iterator[tuple[int, Tensor]]:
    """(count, places) of the entries of ``counts`` with equal counts above 0, ``most // count`` at a time."""
    order = counts.flatten().argsort(stable=True)
    found, sizes = torch.unique_consecutive(counts.flatten()[order], return_counts=True)
    for count, places in zip(found.tolist(), order.split(sizes.tolist()), strict=True):
        if count:
            yield from ((count, some) for some in places.split(max(1, most // count)))


def _join(part: tuple[Tensor, Tensor], more: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`reference.merge` of two (out, lse) pairs, in fewer passes; a query that sees nothing in either stays 0."""
    (out, lse), (out_more, lse_more) = part, more
    weight = (lse_more - lse).sigmoid().masked_fill(lse_more == float("-inf"), 0)
    return torch.lerp(out, out_more.to(out.dtype), weight[..., None]), torch.logaddexp(lse, lse_more)
