"""``store: full``: every token is kept, in one buffer that grows by an eighth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..config.bounds import MOST
from ..layout.dtypes import needs_grad
from ..layout.heads import RoleHeads
from ..layout.rows import Rows
from ..layout.segments import HeadKV, Place, Segment
from ._saved import SavedSegment, SavedStore, short
from .base import Store, StoreSpec, room


@dataclass(frozen=True)
class Full(StoreSpec):
    """Cache every token."""

    roles = ("retrieval",)

    def new(self, heads: RoleHeads, max_tokens: int | None) -> FullStore:
        return FullStore(self, heads, max_tokens)

    def cached_tokens(self, tokens: int) -> int:
        return tokens


@dataclass
class Staggered(HeadKV):
    """What rows kept that share a prompt and go on from different tokens of it.

    Attributes:
        aligned: the first slots of `segments`, in which a row that starts at slot s has its first ``aligned - s``
            tokens, from the first slot on; what is behind them is another row's.
    """

    aligned: int = 0

    def alone(self, rows: slice, start: int) -> list[Segment]:
        left = []
        low = 0
        pads = max(0, start - self.aligned)
        for segment in self.segments:
            length = segment.length
            skip = 0
            if low < self.aligned:
                length = max(0, min(length, self.aligned - start - low))
            else:
                skip = min(pads, length)
                pads -= skip
            low += segment.length
            if skip < length:
                left.append(Segment(segment.k[rows, :, skip:length], segment.v[rows, :, skip:length], length - skip))
        return left


class FullStore(Store):
    """One growing buffer; a slot of the batch is a slot of the buffer, pads included.

    A fork makes what was kept so far a segment of its own before that buffer, to which nobody writes any more.

    Attributes:
        aligned: see `Staggered`; a whole number of segments. 0: pads are where they are in the batch.
    """

    numbers: ClassVar[tuple[str, ...]] = ("aligned",)
    staggers = True

    def __init__(self, spec: Full, heads: RoleHeads, max_tokens: int | None):
        super().__init__(spec, heads, max_tokens)
        self.aligned = 0

    def append(self, k: Tensor, v: Tensor, rows: Rows) -> HeadKV:
        shared = [segment for name, segment in self.segments.items() if name != "kept"]
        before = sum(segment.length for segment in shared)
        # One dtype for all of them: autocast may have been switched since the fork.
        like = next(((one.k, one.v) for one in shared if isinstance(one, Segment)), (k, v))
        limit = None if self.max_tokens is None else self.max_tokens - before
        kept = self.grow("kept", *like, rows.total - before, limit)
        self.heads.copy_to(kept.k[:, :, rows.past - before : rows.total - before], k)
        self.heads.copy_to(kept.v[:, :, rows.past - before : rows.total - before], v)
        kept.length = rows.total - before
        first = rows.past == 0 and needs_grad(k, v)
        seen = [Segment(*self.incoming(k, v), rows.total)] if first else self._views()
        return self._shown(self._hide_pads(seen, rows) if rows.new == 1 and rows.padded else seen)

    def held(self, rows: Rows) -> HeadKV:
        return self._shown(self._views())

    def _views(self) -> list[Segment]:
        return [Segment(*segment.contents(), segment.length) for segment in self.segments.values()]

    def _shown(self, segments: list[Segment]) -> HeadKV:
        if self.aligned:
            return Staggered(self.heads, segments, self.spec, state=self.state, aligned=self.aligned)
        return HeadKV(self.heads, segments, self.spec, state=self.state)

    def place(self, rows: Rows) -> Place | None:
        kept = self.segments.get("kept")
        most = room(rows.total, self.max_tokens)  # more is given back by `append`: the cache was cropped
        if kept is None or len(self.segments) > 1 or not rows.total <= kept.k.shape[2] <= most:
            return None
        return Place(kept, rows.past, rows.total)

    def _hide_pads(self, segments: list[Segment], rows: Rows) -> list[Segment]:
        """The segments for one query, with a score bias where a slot is not every row's own."""
        own = self.aligned - min(self.aligned, max(rows.starts))  # up to here every row has tokens
        pads = not self.aligned or max(rows.starts) > self.aligned
        low = 0
        parts = []
        for segment in segments:
            high = low + segment.length
            device = segment.k.device
            dtype = segment.dtype
            cuts = [low, own, high] if low < own < high else [low, high]
            for a, b in zip(cuts[:-1], cuts[1:], strict=True):
                pair = (segment.k[:, :, a - low : b - low], segment.v[:, :, a - low : b - low])
                part = Segment(*pair, b - a, bias_of_pads=True)
                if own <= a < self.aligned:
                    part.bias = rows.tail_bias(self.aligned, device, dtype)[..., a - own : b - own]
                elif a >= self.aligned and pads:
                    part.bias = rows.pad_bias(device, dtype)[..., a:b]
                parts.append(part)
            low = high
        return parts

    def check(self, saved: SavedStore) -> None:
        ends = {0, *self._check_parts(saved, saved.segments())}
        aligned = saved.number("aligned", 0, saved.rows.total)
        if aligned not in ends or (aligned > 0) != saved.staggered:
            saved.refuse(f"aligned {aligned} is not where one of its segments ends")

    def _check_parts(
        self, saved: SavedStore, parts: dict[str, SavedSegment], before: int = 0, slots: int = 0
    ) -> Iterator[int]:
        """Where the plain segments end, which follow ``before`` others of ``slots`` slots together."""
        kept = "kept" in parts
        names = [f"shared {at}" for at in range(before, before + len(parts) - kept)] + ["kept"] * kept
        if list(parts) != names:
            saved.refuse(f"its segments are {short(list(parts))}, expected those of forks (shared ...), then kept")
        left = saved.rows.total - slots
        for name, part in parts.items():
            own = name == "kept"
            left -= part.plain(left if own else 1, left, (self.max_tokens or MOST) if own else None, shared=not own)
            yield saved.rows.total - left
        if left:
            saved.refuse(f"{left} of the tokens seen are in no segment")

    def crop(self, rows: Rows, target: int) -> None:
        low = 0
        for name, segment in list(self.segments.items()):
            keep = max(0, min(segment.length, target - low))
            low += segment.length
            if name == "kept":
                segment.length = keep
            elif keep:
                self.segments[name] = segment.frozen(keep, spare=1) if keep < segment.length else segment
            else:
                del self.segments[name]
        self.aligned = min(self.aligned, target)

    def stagger(self, rows: Rows, pads: Sequence[int]) -> None:
        self._share()
        self.aligned = rows.total

    def reset(self) -> None:
        super().reset()
        self.aligned = 0

    def fork(self) -> FullStore:
        self._share()
        return super().fork()

    def _share(self) -> None:
        kept = self.segments.get("kept")
        if kept is not None:
            segments = {name: segment for name, segment in self.segments.items() if name != "kept"}
            if kept.length:
                segments[f"shared {len(segments)}"] = kept.frozen(kept.length, spare=1 / 8)
            self.segments = segments  # at once: several threads may fork one cache
