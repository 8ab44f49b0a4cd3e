"""``store: sink_recent``: the first tokens (sinks) and the latest ones, in constant memory.

StreamingLLM, arXiv:2309.17453; as the store of streaming heads: DuoAttention, arXiv:2410.10819. Keys keep the rotary
positions they were computed with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..config.bounds import TOKENS, TOKENS_OR_NONE
from ..errors import CacheError
from ..layout.dtypes import needs_grad
from ..layout.heads import RoleHeads
from ..layout.reads import CAUSAL, Causal, Window
from ..layout.rows import Rows
from ..layout.segments import HeadKV, Place, Segment
from ._history import History, runs
from ._saved import SavedStore, short
from .base import SLACK, Reserve, Store, StoreSpec, blanked, room, window_positions


@dataclass(frozen=True)
class SinkRecent(StoreSpec):
    """Cache the first ``sink`` and the latest ``recent`` tokens of each sequence.

    A query at row position ``i`` sees key ``j`` when ``j <= i and (j < sink or i - j < recent)``.

    Attributes:
        sink: first tokens of a sequence.
        recent: latest tokens, the query's own among them.
    """

    roles = ("streaming",)
    rule = "positional"
    cases = ({"sink": 4, "recent": 16},)

    sink: int = field(default=64, metadata=TOKENS_OR_NONE)
    recent: int = field(default=256, metadata=TOKENS)

    def new(self, heads: RoleHeads, max_tokens: int | None) -> SinkRecentStore:
        return SinkRecentStore(self, heads, max_tokens)

    def cached_tokens(self, tokens: int) -> int:
        return min(tokens, self.window)

    @property
    def window(self) -> int:
        """Most tokens of a row that are kept."""
        return self.sink + self.recent

    def capacity(self, tokens: int, reserve: Reserve) -> int:
        dropped = min(reserve.slack, max(0, tokens - self.window))
        ring = room(self.cached_tokens(tokens), reserve.max_tokens, self.window)
        return ring + self.history(dropped, reserve.max_tokens, reserve.slack)

    def history(self, dropped: int, max_tokens: int | None, slack: int) -> int:
        """Slots for ``dropped`` tokens that left the ring and are remembered, and one that takes what is not."""
        reserved = None if max_tokens is None else max_tokens - self.window
        return room(dropped, reserved, slack) + 1 if slack and max(dropped, reserved or 0) > 0 else 0

    def reads(self, part: HeadKV, rows: Rows, group: slice, start: int) -> tuple[list[Segment], Window]:
        sinks = part.sinks
        band = part.segments[0]
        if sinks is None:
            sink_k, sink_v = (t[group, :, start : start + self.sink] for t in (band.k, band.v))
        else:
            count = min(sinks.length, rows.total - start)
            sink_k = sinks.k[group, :, :count]
            sink_v = sinks.v[group, :, :count]
        skipped = max(0, start + self.sink - part.first)
        k, v = (t[group, :, skipped : band.length] for t in (band.k, band.v))
        segments = [Segment(sink_k, sink_v, sink_k.shape[2]), Segment(k, v, k.shape[2])]
        return segments, Window(self.recent, rows.total - start - k.shape[2])

    def tail_reads(
        self, part: HeadKV, rows: Rows, group: slice, start: int, queries: int
    ) -> tuple[list[Segment], Causal]:
        if start >= rows.past:
            return part.begun(group, start), CAUSAL
        (sinks, _), _ = self.reads(part, rows, group, start)
        before = rows.past - start
        count = min(self.sink, before)
        first = start + max(count, before - self.recent + 1) - part.first
        band = part.segments[0]
        own = tuple(x[group, :, first : band.length] for x in (band.k, band.v))
        pairs = [tuple(x[:, :, :count] for x in (sinks.k, sinks.v)), own] if count else [own]
        return [Segment(*pair, pair[0].shape[2]) for pair in pairs], CAUSAL

    def shown(self, part: HeadKV, rows: Rows, row: int) -> tuple[list[Segment], Tensor]:
        group = slice(row, row + 1)
        start = rows.start(row)
        if rows.new > 1:
            segments, window = self.reads(part, rows, group, start)
            return segments, window_positions(segments, window.first)
        ring = part.segments[0]
        count = rows.total - start
        filled = min(count, self.window)
        slots = torch.arange(filled)
        latest = count - 1 - (count - 1 - slots) % self.recent  # the newest position that lives in a slot of the ring
        positions = torch.where(slots < self.sink, slots, latest) if count > self.window else slots
        return [Segment(ring.k[group, :, :filled], ring.v[group, :, :filled], filled)], positions


class SinkRecentStore(History, Store):
    """Sinks and a ring, sequence by sequence, in one segment: exactly the keys a decoded token reads, without a mask.

    Row position ``j`` lives in slot ``j`` while ``j < sink + recent`` and in ``sink + (j - sink) % recent`` later. With
    sink 2 and recent 4, after 9 tokens (positions 0 to 8; the next one, 9, overwrites 5):

        kept     slot   0   1 | 2   3   4   5      history  slot   0   1   2  ...  size-1   last
                 holds  0   1 | 6   7   8   5               holds  positions 2, 3, 4        what nobody needs
                       sinks    ^ ring                             position j in slot j % (size - 1)

    What the ring pushes out stays for a while in ``history``, a second ring, so that rejected tokens can be rolled
    back. It is made when the ring first pushes something out, and grows with that up to `SLACK` tokens. Its last slot
    takes the writes of sequences that push nothing out, so that one indexed write serves the whole batch.
    """

    numbers: ClassVar[tuple[str, ...]] = ("oldest",)
    staggers = True

    def __init__(self, spec: SinkRecent, heads: RoleHeads, max_tokens: int | None):
        super().__init__(spec, heads, max_tokens)
        self.oldest = 0  # slot from which on every token outside the sinks is in the ring or in the history

    @property
    def window(self) -> int:
        return self.spec.window

    def append(self, k: Tensor, v: Tensor, rows: Rows) -> HeadKV:
        if (kept := self.segments.get("kept")) is not None:  # filled in another dtype (autocast), it stays in that
            k = k.to(kept.dtype)
            v = v.to(kept.dtype)
        kept = self.grow("kept", k, v, min(rows.total, self.window), self.window)
        self._make_history(k, v, rows)
        if rows.new == 1:
            self._write_token(k, v, rows)
            view = self._decode_view(rows)
            if rows.past == 0 and needs_grad(k, v):
                view.segments[0].k, view.segments[0].v = self.incoming(k, v)
        else:
            band = self._band(k, v, rows)
            self._write(k, v, rows)
            view = HeadKV(self.heads, [band], self.spec, first=rows.total - band.length)
            view.sinks = self._sinks(kept, band, rows, needs_grad(k, v))
        self.oldest = max(self.oldest, rows.total - self.spec.recent - self.slack)
        return view

    def place(self, rows: Rows) -> Place | None:
        kept = self.segments.get("kept")
        position = rows.past
        if kept is None or min(rows.total, self.window) > kept.k.shape[2]:
            return None
        slot = self._slot(position)
        if position >= self.window:
            self._make_history(kept.k, kept.v, rows)
            if self.slack:
                self._remember(slice(None), position - self.spec.recent, kept.k, kept.v, slot, 1)
        self.oldest = max(self.oldest, rows.total - self.spec.recent - self.slack)
        return Place(kept, slot, min(rows.total, self.window))

    def _slot(self, position: int) -> int:
        sink = self.spec.sink
        recent = self.spec.recent
        return position if position < self.window else sink + (position - sink) % recent

    def _decode_view(self, rows: Rows) -> HeadKV:
        kept = self.segments["kept"]
        lengths = [max(0, min(rows.total - start, self.window)) for start in rows.starts or (0,)]
        kept.length = max(lengths)
        length = lengths[0] if min(lengths) == max(lengths) else rows.ints(lengths, kept.k.device)
        seen = Segment(kept.k[:, :, : kept.length], kept.v[:, :, : kept.length], length)
        return HeadKV(self.heads, [seen], self.spec, state=self.state)

    def _write_token(self, k: Tensor, v: Tensor, rows: Rows) -> None:
        """One new token per row: a slice where all rows share the slot, an indexed write where they do not."""
        positions = [rows.past - start for start in rows.starts or (0,)]
        if len(positions) == 1 or min(positions) < 0:
            self._write(k, v, rows)
            return
        kept = self.segments["kept"]
        device = k.device
        slots = rows.ints([self._slot(p) for p in positions], device)
        row = rows.memo(("rows", device), lambda: torch.arange(rows.batch, device=device))
        if "history" in self.segments:
            past = self.segments["history"]
            size = past.k.shape[2] - 1
            leaving = [(p - self.spec.recent) % size if p >= self.window else size for p in positions]
            spots = rows.ints(leaving, device)
            past.k[row, :, spots], past.v[row, :, spots] = kept.k[row, :, slots], kept.v[row, :, slots]
        kept.k[row, :, slots] = self.heads.take(k)[:, :, 0].detach()
        kept.v[row, :, slots] = self.heads.take(v)[:, :, 0].detach()

    def _write(self, k: Tensor, v: Tensor, rows: Rows) -> None:
        """New tokens into sinks and ring, and what they push out into the history, rows with one start at a time."""
        sink = self.spec.sink
        recent = self.spec.recent
        kept = self.segments["kept"]
        for group, start in rows.groups():
            p = max(0, rows.past - start)
            end = rows.total - start
            shift = start - rows.past  # position + shift = column of k
            oldest = max(sink, end - recent - self.slack)
            for a, b in runs(max(oldest, p - recent), min(p, end - recent), recent, sink):
                self._remember(group, a, kept.k, kept.v, self._slot(a), b - a)
            if (fresh := max(oldest, p)) < end - recent:
                self._remember(group, fresh, k, v, fresh + shift, end - recent - fresh, self.heads)
            for a, b in [(p, min(sink, end)), *runs(max(sink, p, end - recent), end, recent, sink)]:
                if a < b:
                    slot = self._slot(a)
                    self.heads.copy_to(kept.k[group, :, slot : slot + b - a], k[group, :, a + shift : b + shift])
                    self.heads.copy_to(kept.v[group, :, slot : slot + b - a], v[group, :, a + shift : b + shift])
        kept.length = min(rows.total, self.window)

    def _band(self, k: Tensor, v: Tensor, rows: Rows) -> Segment:
        """Slots ``total - length .. total``: what is kept of the last ``recent - 1`` old slots, and the new ones."""
        k, v = self.incoming(k, v)
        back = min(rows.past, self.spec.recent - 1)
        if back == 0:
            return Segment(k, v, rows.new)
        kept = self.segments["kept"]
        old = self.new_segment(k, v, back)
        for group, start in rows.groups():
            low = max(self.spec.sink, rows.past - start - back)
            for a, b in runs(low, rows.past - start, self.spec.recent, self.spec.sink):
                into = slice(a - (rows.past - start - back), b - (rows.past - start - back))
                old.k[group, :, into] = kept.k[group, :, self._slot(a) : self._slot(a) + b - a]
                old.v[group, :, into] = kept.v[group, :, self._slot(a) : self._slot(a) + b - a]
        return Segment(torch.cat([old.k, k], 2), torch.cat([old.v, v], 2), back + rows.new)

    def _sinks(self, kept: Segment, band: Segment, rows: Rows, differentiable: bool) -> Segment | None:
        """The first tokens of each row; from the incoming keys where a gradient must flow through them."""
        count = min(self.spec.sink, rows.total)
        if count == 0:
            return None
        if differentiable and rows.past == 0:
            k, v = (torch.nn.functional.pad(t, (0, 0, 0, count)) for t in (band.k, band.v))
            k, v = (torch.cat([t[g, :, start : start + count] for g, start in rows.groups()]) for t in (k, v))
            return Segment(k, v, count)
        return Segment(kept.k[:, :, :count], kept.v[:, :, :count], count)

    def oldest_crop(self, total: int) -> int:
        return self.oldest + self.spec.recent if self.oldest > self.spec.sink else 0

    def crop(self, rows: Rows, target: int) -> None:
        if target < self.oldest_crop(rows.total):
            raise CacheError(
                f"cannot go back to {target} tokens: the window needs what was dropped before {self.oldest}."
            )
        kept = self.segments.get("kept")
        if kept is None:
            return
        for group, start in rows.groups():
            self._take_back(group, rows.total - start, target - start)
        kept.length = min(target, self.window)
        if target <= self.window and self.max_tokens is None:
            self.segments.pop("history", None)
            self.oldest = 0

    def check(self, saved: SavedStore) -> None:
        seen = saved.rows.total
        sink = self.spec.sink
        recent = self.spec.recent
        parts = saved.segments()
        most = min(seen, self.window)
        oldest = saved.number("oldest", max(0, seen - recent - SLACK), max(sink, seen - recent))
        dropped = max(0, seen - recent - max(sink, oldest))  # tokens that are remembered
        rings = [["kept", "history"]] if dropped else [["kept"], ["kept", "history"]]
        if list(parts) not in rings:
            saved.refuse(f"its segments are {short(list(parts))}, expected {rings[0]} after {seen} tokens")
        # Longer than the longest row where a longer one has left the batch.
        parts["kept"].plain(min(most, max(seen - start for start in saved.starts)), most, self.window)
        if "history" in parts:
            parts["history"].plain(max(2, dropped + 1), SLACK + 1, None)

    def filled(self, rows: Rows) -> dict[str, Segment]:
        """Slots that no token of their row fills, or that hold what was rejected, are zeros."""
        parts = dict(self.segments)
        if "kept" in parts:
            held = [(group, max(0, min(rows.total - start, self.window))) for group, start in rows.groups()]
            parts["kept"] = blanked(parts["kept"], held)
        if "history" in parts:
            past = parts["history"]
            blank = replace(past, k=torch.zeros_like(past.k), v=torch.zeros_like(past.v))
            self._copy_history(past, blank, rows, self.oldest, rows.total - self.spec.recent)
            parts["history"] = blank
        return parts

    def stagger(self, rows: Rows, pads: Sequence[int]) -> None:
        for row, count in enumerate(pads):
            self._take_back(slice(row, row + 1), rows.total, rows.total - count)
        if self.oldest > self.spec.sink:
            self.oldest += max(pads)

    def reset(self) -> None:
        super().reset()
        self.oldest = 0
