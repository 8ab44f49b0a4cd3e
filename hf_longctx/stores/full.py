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
    """One growing buffer; a slot of the batch is a slot of the buffer, pads included."""

    def append(self, k: Tensor, v: Tensor, rows: Rows) -> HeadKV:
        kept = self.grow("kept", k, v, rows.total)
        self.heads.copy_to(kept.k[:, :, rows.past : rows.total], k)
        self.heads.copy_to(kept.v[:, :, rows.past : rows.total], v)
        kept.length = rows.total
        seen = Segment(kept.k, kept.v, rows.total)
        if rows.past == 0 and needs_grad(k, v):
            seen = Segment(*self.incoming(k, v), rows.total)
        if rows.new == 1:
            seen.bias = rows.pad_bias(kept.k.device, kept.k.dtype)
        return HeadKV(self.heads, [seen], self.spec, state=self.state)

    def crop(self, rows: Rows, target: int) -> None:
        if "kept" in self.segments:
            self.segments["kept"].length = min(self.segments["kept"].length, target)
