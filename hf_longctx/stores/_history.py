"""What a ring pushed out and still remembers, so that rejected tokens can be rolled back."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..layout.heads import RoleHeads
from ..layout.rows import Rows
from ..layout.segments import Segment


class History:
    """Part of `SinkRecentStore`, whose drawing shows it: the segment ``history``, a ring of all its slots but the last.

    Row position ``j`` lives in slot ``j`` modulo their number. It is made when the ring first pushes something out, and
    grows with that up to ``slack`` tokens.
    """

    def _make_history(self, k: Tensor, v: Tensor, rows: Rows) -> None:
        """Room for what this forward pushes out of the ring, and for what is remembered."""
        total = rows.total
        recent = self.spec.recent
        oldest = max(self.oldest, total - recent - self.slack)
        dropped = max(0, total - recent - max(oldest, self.spec.sink))
        size = self.spec.history(dropped, self.max_tokens, self.slack)
        past = self.segments.get("history")
        if size == 0 or (past is not None and dropped < past.k.shape[2] <= size):
            return
        grown = self.new_segment(k, v, size)
        if past is not None:
            self._copy_history(past, grown, rows, oldest, rows.past - recent)
        grown.length = size  # a ring: every slot may be filled
        self.segments["history"] = grown

    def _copy_history(self, past: Segment, into: Segment, rows: Rows, low: int, high: int) -> None:
        """Copy what is remembered of the slots ``low .. high`` into a history of another size."""
        size = past.k.shape[2] - 1
        other = into.k.shape[2] - 1
        for group, start in rows.groups():
            for a, b in runs(max(self.spec.sink, low - start), high - start, size, 0):
                for c, d in runs(a, b, other, 0):
                    to = slice(c % other, c % other + d - c)
                    out = slice(c % size, c % size + d - c)
                    into.k[group, :, to], into.v[group, :, to] = past.k[group, :, out], past.v[group, :, out]

    def _remember(self, group, position, k, v, column, count, heads: RoleHeads | None = None) -> None:
        """Copy ``count`` positions from columns of k, v into the history (all heads of k, or ``heads`` of them)."""
        past = self.segments["history"]
        size = past.k.shape[2] - 1
        done = 0
        for a, b in runs(position, position + count, size, 0):
            spot = a % size
            source = slice(column + done, column + done + b - a)
            for into, out in ((past.k, k), (past.v, v)):
                into = into[group, :, spot : spot + b - a]
                out = out[group, :, source]
                heads.copy_to(into, out) if heads else into.copy_(out)
            done += b - a

    def _take_back(self, group: slice, seen: int, target: int) -> None:
        """Put what rows that go back from ``seen`` to ``target`` tokens need again from the history into the ring."""
        kept = self.segments["kept"]
        sink = self.spec.sink
        recent = self.spec.recent
        gone = min(seen - recent, target)  # up to here the ring has pushed its tokens out
        for a, b in runs(max(sink, target - recent), gone, recent, sink):
            past = self.segments["history"]
            slot = self._slot(a)
            size = past.k.shape[2] - 1
            for c, d in runs(a, b, size, 0):
                into = slice(slot + c - a, slot + d - a)
                out = slice(c % size, c % size + d - c)
                kept.k[group, :, into] = past.k[group, :, out]
                kept.v[group, :, into] = past.v[group, :, out]


def runs(low: int, high: int, size: int, offset: int) -> Iterator[tuple[int, int]]:
    """Cut positions ``low .. high`` where a ring of ``size`` slots that starts at position ``offset`` wraps."""
    while low < high:
        stop = min(high, low + size - (low - offset) % size)
        yield low, stop
        low = stop
