"""``store: sink_recent_compensated``: sinks, the latest tokens, and the mean of all that was dropped between them.

RazorAttention, arXiv:2407.15891. Its mean is over keys after their rotary embedding (algorithm 1 there), so every key
keeps the position it was computed with, here as there.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..config.bounds import MOST, TOKENS, TOKENS_OR_NONE
from ..errors import CacheError
from ..kernels._compensated import total
from ..layout.heads import RoleHeads
from ..layout.reads import CAUSAL, Averaged, Reads
from ..layout.rows import Rows
from ..layout.segments import HeadKV, Segment
from ._saved import SavedStore, short
from .base import SLACK, SPARE, Bytes, Reserve, Store, StoreSpec, blanked, room, spare, window_positions


@dataclass(frozen=True)
class Growing:
    """A window that grows with the sequence: ``max(min, floor(fraction * tokens so far))`` tokens.

    Attributes:
        min: latest tokens that a query sees at least, its own among them.
        fraction: share of the sequence's tokens so far, the query's own among them.
    """

    min: int = field(default=4000, metadata=TOKENS)
    fraction: float = field(default=0.2, metadata={"above": 0.0, "max": 0.9})


@dataclass(frozen=True)
class SinkRecentCompensated(StoreSpec):
    """Cache the first ``sink`` and the latest ``recent`` tokens of each sequence, and one mean of those between them.

    A query at row position ``i`` with a window of ``R`` tokens sees key ``j`` when ``j <= i and (j < sink or
    i - j < R)``, and the mean of the keys ``sink <= j <= i - R`` as one more, the log of their number added to its
    score: as much weight as that many keys that all equal the mean.

    Attributes:
        sink: first tokens of a sequence.
        recent: latest tokens, the query's own among them; or a window that grows with the sequence.
    """

    roles = ("streaming",)
    rule = "positional"
    estimates = True
    cases = ({"sink": 4, "recent": 16}, {"sink": 3, "recent": {"min": 9, "fraction": 0.3}})

    sink: int = field(default=64, metadata=TOKENS_OR_NONE)
    recent: int | Growing = field(default=256, metadata=TOKENS)

    def new(self, heads: RoleHeads, max_tokens: int | None) -> SinkRecentCompensatedStore:
        return SinkRecentCompensatedStore(self, heads, max_tokens)

    def window(self, i: int) -> int:
        """Latest tokens that the query at row position ``i`` sees, its own among them."""
        if isinstance(self.recent, int):
            return self.recent
        return max(self.recent.min, math.floor(self.recent.fraction * (i + 1)))

    def edge(self, i: int) -> int:
        """First row position of that window outside of the sinks; grows by 0 or 1 from one position to the next."""
        return max(self.sink, i + 1 - self.window(i))

    def cached_tokens(self, tokens: int) -> int:
        return min(tokens, self.sink + self.window(tokens - 1))

    def capacity(self, tokens: int, reserve: Reserve) -> int:
        sinks = room(min(tokens, self.sink), reserve.max_tokens, self.sink)
        return sinks + self.band(tokens, reserve.max_tokens, reserve.slack)

    def nbytes(self, tokens: int, head_dim: int, itemsize: int, reserve: Reserve | None = None) -> Bytes:
        buffers = super().nbytes(tokens, head_dim, itemsize, reserve).device
        return Bytes(buffers + 2 * head_dim * torch.float64.itemsize)  # and the two sums

    def held(self, tokens: int, slack: int = SLACK) -> int:
        """Tokens outside of the sinks that a row needs, those to go back to included."""
        return max(0, tokens - self.edge(tokens - slack - 1))

    def band(self, tokens: int, max_tokens: int | None = None, slack: int = SLACK) -> int:
        """Slots of the buffer that holds them after ``tokens`` tokens."""
        if max_tokens is None:
            return room(self.held(tokens, slack), None) if tokens + SPARE > self.sink else 0
        return min(max(0, max_tokens - self.sink), room(self.held(max_tokens, slack), None))

    def reads(self, part: HeadKV, rows: Rows, group: slice, start: int) -> tuple[list[Segment], Averaged]:
        band = part.segments[0]
        dropped = None
        end = rows.total - start
        if part.state:
            first = self.edge(rows.past - start - 1)
            count = min(self.sink, end)
            dropped = tuple(part.state[name][group] for name in "kv")
            held = (band.k, band.v) if part.sinks is None else (part.sinks.k, part.sinks.v)
            sinks = tuple(x[group, :, :count] for x in held)
        else:
            first = self.sink
            sinks = tuple(x[group, :, start : start + self.sink] for x in (band.k, band.v))
        recent = tuple(x[group, :, start + first - part.first : band.length] for x in (band.k, band.v))
        begin = max(0, rows.past - start)
        edges = rows.memo(
            ("edges", self, begin, end, band.k.device),
            lambda: torch.tensor([self.edge(i) for i in range(begin, end)], device=band.k.device),
        )
        segments = [Segment(*pair, pair[0].shape[2]) for pair in (sinks, recent)]
        return segments, Averaged(self.sink, first, end, self.edge, edges, dropped)

    def tail_reads(
        self, part: HeadKV, rows: Rows, group: slice, start: int, queries: int
    ) -> tuple[list[Segment], Reads]:
        """The mean is that of the first new token: what its window dropped before this forward."""
        if start >= rows.past:
            return part.begun(group, start), CAUSAL
        segments, averaged = self.reads(part, rows, group, start)
        edge = self.edge(rows.past - start)
        device = averaged.edges.device
        edges = rows.memo(("tail edges", queries, edge, device), lambda: torch.full((queries,), edge, device=device))
        return segments, replace(averaged, edge=lambda _: edge, edges=edges)

    def shown(self, part: HeadKV, rows: Rows, row: int) -> tuple[list[Segment], Tensor]:
        group = slice(row, row + 1)
        start = rows.start(row)
        count = rows.total - start
        if rows.new > 1:
            segments, averaged = self.reads(part, rows, group, start)
            return segments, window_positions(segments, averaged.first)
        sinks = min(self.sink, count)
        window = max(0, count - self.edge(count - 1))
        if rows.past == 0:
            sinks = 0
            window = count
        # sinks where there are any, window, and the mean, which is no token
        segments = list(part.segments)
        ends = []
        if sinks:
            ends.append(_cut(segments.pop(0), group, 0, sinks))
        if window:
            ends.append(_cut(segments[0], group, segments[0].longest - window, segments[0].longest))
        return ends, torch.cat([torch.arange(sinks), torch.arange(count - window, count)])


class SinkRecentCompensatedStore(Store):
    """Sinks by row position, then a buffer of batch slots that begins at slot ``low``, and two sums of what left it.

        row positions   0 .. sink-1 | sink ........ edge-1 | edge ......... newest
                        sinks       | summed in state      | window
        buffer                              |low ... edge-1|edge ......... newest|  free |
                                             for a rollback

    The buffer holds the windows of all sequences and the tokens before them that a rollback may need. When it is full,
    what is still needed moves to its front. The sums are in float64 and of exactly the tokens before each sequence's
    window, so a rollback subtracts what comes back.
    """

    numbers: ClassVar[tuple[str, ...]] = ("low", "begin")

    def __init__(self, spec: SinkRecentCompensated, heads: RoleHeads, max_tokens: int | None):
        super().__init__(spec, heads, max_tokens)
        self.low = 0  # slot of the buffer's first token
        self.begin = 0  # first start of any row

    def append(self, k: Tensor, v: Tensor, rows: Rows) -> HeadKV:
        view = HeadKV(self.heads, [Segment(*self.incoming(k, v), rows.new)], self.spec)
        self.begin = min(rows.starts or (0,))
        if not self.state:
            self._no_sums(k, v)
        if rows.new > 1 and rows.past:
            view.segments, view.first = self._band(k, v, rows)
            view.state = {name: tensor.clone() for name, tensor in self.state.items()}
        if rows.new == 1:
            self._drop_one(rows)
        else:
            self._drop(k, v, rows)
        self._make_room(k, v, rows)
        self._write(k, v, rows)
        if rows.new == 1:
            self._view_token(view, rows)
        elif rows.past:
            view.sinks = self.segments.get("sinks")
        return view

    def _no_sums(self, k: Tensor, v: Tensor) -> None:
        with torch.inference_mode(False):  # as in new_segment
            for name, x in (("k", k), ("v", v)):
                shape = (x.shape[0], len(self.heads.kv_heads), 1, x.shape[3])
                self.state[name] = x.new_zeros(shape, dtype=torch.float64)

    def _sums(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(sum of what was dropped, the buffer) of keys and of values."""
        band = self.segments["recent"]
        return (self.state["k"], band.k), (self.state["v"], band.v)

    def _band(self, k: Tensor, v: Tensor, rows: Rows) -> tuple[list[Segment], int]:
        """What the longest row's window held before this forward, and the new tokens; slot of the first of them."""
        k, v = self.incoming(k, v)
        first = min(rows.past, self.begin + self.spec.edge(rows.past - self.begin - 1))
        if first < rows.past:
            k, v = (
                torch.cat([held[:, :, first - self.low : rows.past - self.low], new], 2)
                for (_, held), new in zip(self._sums(), (k, v), strict=True)
            )
        return [Segment(k, v, k.shape[2])], first

    def _drop(self, k: Tensor, v: Tensor, rows: Rows) -> None:
        """Add to the sums what leaves the windows, rows with one start at a time."""
        for group, start in rows.groups():
            low = start + self.spec.edge(rows.past - start - 1)
            high = start + self.spec.edge(rows.total - start - 1)
            if low < min(high, rows.past):
                for done, held in self._sums():
                    done[group] += total(held[group, :, low - self.low : min(high, rows.past) - self.low])
            if (low := max(low, rows.past)) < high:
                for name, x in (("k", k), ("v", v)):
                    leaving = x[group, :, low - rows.past : high - rows.past].detach()
                    self.state[name][group] += total(self.heads.take(leaving))

    def _drop_one(self, rows: Rows) -> None:
        """The same for one new token, by which a row drops one or none: a slice where all rows drop the same slot."""
        edges = [(self.spec.edge(rows.past - s - 1), self.spec.edge(rows.past - s)) for s in rows.starts or (0,)]
        leaves = [a < b for a, b in edges]
        if not any(leaves):
            return
        slots = [s + a - self.low for s, (a, _) in zip(rows.starts or (0,), edges, strict=True)]
        if all(leaves) and min(slots) == max(slots):
            for done, held in self._sums():
                done += held[:, :, slots[0] : slots[0] + 1]
            return
        device = self.state["k"].device
        spots = rows.ints([slot if leaving else 0 for slot, leaving in zip(slots, leaves, strict=True)], device)
        row = rows.memo(("rows", device), lambda: torch.arange(rows.batch, device=device))
        given = rows.ints([int(leaving) for leaving in leaves], device)[:, None, None] > 0
        for done, held in self._sums():
            done += held[row, :, spots].masked_fill(~given, 0)[:, :, None]

    def _make_room(self, k: Tensor, v: Tensor, rows: Rows) -> None:
        """A buffer for all slots that are needed, older ones only where there is room; ``low`` is its first."""
        needed = self.begin + self.spec.edge(rows.total - self.slack - self.begin - 1)
        low = max(self.low, min(rows.total, needed))
        band = self.segments.get("recent")
        capacity = self.spec.band(rows.total - self.begin, self.max_tokens, self.slack)
        size = 0 if band is None else band.k.shape[2]
        keep = max(0, rows.past - low)
        if keep == 0:
            self.low = low
        held = rows.total - low
        full = rows.total - self.low > size and size < capacity and size - held < spare(held) // 2
        if size > capacity or held > size or full or (band is None and capacity):
            like = band or self.segments.get("sinks")
            grown = self.new_segment(k, v, capacity) if like is None else self.new_segment(like.k, like.v, capacity)
            if keep:
                grown.k[:, :, :keep] = band.k[:, :, low - self.low : rows.past - self.low]
                grown.v[:, :, :keep] = band.v[:, :, low - self.low : rows.past - self.low]
            self.segments["recent"], self.low = grown, low
        elif rows.total - self.low > size:
            step = low - self.low
            self.low = low
            for at in range(0, keep, step):  # no piece overlaps what it is copied from
                into = slice(at, min(at + step, keep))
                out = slice(at + step, min(at + step, keep) + step)
                band.k[:, :, into] = band.k[:, :, out]
                band.v[:, :, into] = band.v[:, :, out]

    def _write(self, k: Tensor, v: Tensor, rows: Rows) -> None:
        """The new tokens into buffer and sinks."""
        sink = self.spec.sink
        fresh = max(rows.past, self.low)
        if (band := self.segments.get("recent")) is not None:
            for into, x in ((band.k, k), (band.v, v)):
                self.heads.copy_to(into[:, :, fresh - self.low : rows.total - self.low], x[:, :, fresh - rows.past :])
            band.length = rows.total - self.low
        if sink == 0:
            return
        sinks = self.grow("sinks", k, v, min(rows.total - self.begin, sink), sink)
        for group, start in rows.groups() if rows.past - max(rows.starts or (0,)) < sink else ():
            a = max(0, rows.past - start)
            b = min(sink, rows.total - start)
            if a < b:
                column = slice(a + start - rows.past, b + start - rows.past)
                self.heads.copy_to(sinks.k[group, :, a:b], k[group, :, column])
                self.heads.copy_to(sinks.v[group, :, a:b], v[group, :, column])
        sinks.length = min(rows.total - self.begin, sink)

    def _view_token(self, view: HeadKV, rows: Rows) -> None:
        """What the one new token of each row reads: sinks, window, mean; a bias or lengths only where rows differ."""
        starts = rows.starts or (0,)
        sink = self.spec.sink
        device = self.state["k"].device
        edges = [self.spec.edge(rows.total - start - 1) for start in starts]
        counts = [max(0, min(sink if rows.past else 1, rows.total - start)) for start in starts]
        length = counts[0] if min(counts) == max(counts) else rows.ints(counts, device)
        if rows.past == 0:
            view.segments[0].length = length
            return
        found = []
        if most := max(counts):
            sinks = self.segments["sinks"]
            found.append(Segment(sinks.k[:, :, :most], sinks.v[:, :, :most], length))
        firsts = [start + edge for start, edge in zip(starts, edges, strict=True)]
        if (low := min(firsts)) < rows.total:
            k, v = (held[:, :, low - self.low : rows.total - self.low] for _, held in self._sums())
            found.append(Segment(k, v, rows.total - low, self._hidden(firsts, rows, k)))
        if max(edges) > sink:
            found.append(self._mean([edge - sink for edge in edges], rows, found[0].dtype))
        view.segments = found or [Segment(*view.segments[0].contents(), 0)]

    def _hidden(self, firsts: list[int], rows: Rows, like: Tensor) -> Tensor | None:
        """Score bias ``[B, 1, 1, N]`` over the slots from the lowest window on: -inf before a row's own window."""
        low = min(firsts)
        high = min(max(firsts), rows.total)
        if low == high:
            return None

        def make() -> Tensor:
            before = torch.arange(low, rows.total, device=like.device) < rows.ints(firsts, like.device)[:, None]
            return torch.zeros(before.shape, device=like.device).masked_fill_(before, -math.inf)[:, None, None]

        return rows.memo(("hidden", tuple(firsts), like.device), make)

    def _mean(self, counts: list[int], rows: Rows, dtype: torch.dtype) -> Segment:
        """The entry of the dropped tokens, ``counts`` of them in each row."""
        counts = counts[:1] if min(counts) == max(counts) else counts
        device = self.state["k"].device
        wide = torch.promote_types(dtype, torch.float32)
        logs = [math.log(count) if count else -math.inf for count in counts]
        bias = rows.memo(("logs", tuple(counts), device, wide), lambda: torch.tensor(logs, dtype=wide, device=device))
        number = rows.ints([max(1, count) for count in counts], device)[:, None, None, None]
        k, v = ((self.state[name] / number).to(dtype) for name in "kv")
        return Segment(k, v, 1, bias[:, None, None, None])

    def oldest_crop(self, total: int) -> int:
        if self.low <= self.begin + self.spec.sink:
            return 0
        needed = self.low - self.begin
        return bisect_left(range(total + 1), needed, key=lambda target: self.spec.edge(target - self.begin - 1))

    def crop(self, rows: Rows, target: int) -> None:
        if target < (oldest := self.oldest_crop(rows.total)):
            raise CacheError(f"cannot go back to {target} tokens: a window needs what was dropped before {oldest}.")
        for group, start in rows.groups() if self.state else ():
            low, high = (start + self.spec.edge(slots - start - 1) for slots in (target, rows.total))
            if low < high:
                for done, held in self._sums():
                    done[group] -= total(held[group, :, low - self.low : high - self.low])
        self.low, self.begin = min(self.low, target), min(self.begin, target)
        for name, length in (("sinks", min(self.spec.sink, target - self.begin)), ("recent", target - self.low)):
            if name in self.segments:
                self.segments[name].length = length

    def check(self, saved: SavedStore) -> None:
        seen = saved.rows.total
        sink = self.spec.sink
        parts = saved.segments()
        begin = saved.number("begin", 0, min(saved.starts))  # the row that began there may have left the batch
        low = saved.number("low", 0, min(seen, begin + self.spec.edge(seen - begin - 1)))
        expected = {"sinks"} if sink else set()
        expected |= {"recent"} if low < seen or "recent" in parts else set()
        if parts.keys() != expected:
            saved.refuse(f"its segments are {short(list(parts))}, expected {sorted(expected)}")
        if "sinks" in parts:
            count = min(sink, seen - begin)
            parts["sinks"].plain(count, count, sink)
        if "recent" in parts:
            parts["recent"].plain(seen - low, seen - low, self.max_tokens or MOST)
        shape = (saved.rows.batch, saved.heads, 1, saved.head_dim)
        saved.state(torch.float64, k=shape, v=shape)

    def filled(self, rows: Rows) -> dict[str, Segment]:
        """The sinks of a row that is shorter are zeros behind its end."""
        parts = dict(self.segments)
        if "sinks" in parts:
            held = [(group, max(0, min(rows.total - start, self.spec.sink))) for group, start in rows.groups()]
            parts["sinks"] = blanked(parts["sinks"], held)
        return parts

    def reset(self) -> None:
        super().reset()
        self.low = self.begin = 0


def _cut(segment: Segment, group: slice, low: int, high: int) -> Segment:
    """Its slots ``low .. high`` of the rows ``group``."""
    return Segment(segment.k[group, :, low:high], segment.v[group, :, low:high], high - low)
