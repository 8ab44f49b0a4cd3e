"""``store: full``: every token is kept, in one buffer that grows by an eighth."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels.layout import HeadKV, RoleHeads, Segment, needs_grad
from ..rows import Rows
from .base import Store, StoreSpec


@dataclass(frozen=True)
class Full(StoreSpec):
    """Keep every token."""

    roles = ("retrieval",)

    def new(self, heads: RoleHeads, max_tokens: int | None) -> FullStore:
        return FullStore(self, heads, max_tokens)

    def kept(self, tokens: int) -> int:
        return tokens

    def span(self) -> None:
        return None


class FullStore(Store):
    """One growing buffer; a slot of the batch is a slot of the buffer, pads included.

    A fork makes what was kept so far a segment of its own before that buffer, to which nobody writes any more.
    """

    def append(self, k: Tensor, v: Tensor, rows: Rows) -> HeadKV:
        before = sum(segment.length for name, segment in self.segments.items() if name != "kept")
        limit = None if self.max_tokens is None else self.max_tokens - before
        kept = self.grow("kept", k, v, rows.total - before, limit)
        self.heads.copy_to(kept.k[:, :, rows.past - before : rows.total - before], k)
        self.heads.copy_to(kept.v[:, :, rows.past - before : rows.total - before], v)
        kept.length = rows.total - before
        seen = [Segment(segment.k, segment.v, segment.length) for segment in self.segments.values()]
        if rows.past == 0 and needs_grad(k, v):
            seen = [Segment(*self.incoming(k, v), rows.total)]
        if rows.new == 1 and (bias := rows.pad_bias(kept.k.device, kept.k.dtype)) is not None:
            low = 0
            for segment in seen:
                segment.bias = bias[..., low : low + segment.length]
                low += segment.length
        return HeadKV(self.heads, seen, self.spec, state=self.state)

    def crop(self, rows: Rows, target: int) -> None:
        low = 0
        for name, segment in list(self.segments.items()):
            keep = max(0, min(segment.length, target - low))
            low += segment.length
            if name == "kept":
                segment.length = keep
            elif keep:
                self.segments[name] = Segment(segment.k[:, :, :keep], segment.v[:, :, :keep], keep, shared=True)
            else:
                del self.segments[name]

    def fork(self) -> FullStore:
        kept = self.segments.pop("kept", None)
        if kept is not None and kept.length:
            own = Segment(kept.k[:, :, : kept.length], kept.v[:, :, : kept.length], kept.length, shared=True)
            self.segments[f"shared {len(self.segments)}"] = own
        return super().fork()
