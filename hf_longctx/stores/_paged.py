"""What the stores of pages share: the newest tokens on the device, all older ones in pages elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..config.bounds import TOKENS, TOKENS_OR_NONE
from ..config.words import spec_word
from ..layout.dtypes import needs_grad
from ..layout.heads import RoleHeads
from ..layout.rows import Rows
from ..layout.segments import HeadKV, Segment
from ._page import Folder, HostMemory, Page
from ._pages import Entry, PagedKV, Pages
from ._saved import SavedStore, short
from .base import Reserve, Store, StoreSpec, room


@dataclass(frozen=True)
class Paged(StoreSpec):
    """Keep every token, the older ones outside of the device.

    Attributes:
        page: tokens of a page.
        recent: newest tokens that stay on the device; up to a page more of them do.
    """

    roles = ("retrieval",)
    cases = ({"page": 16, "recent": 20},)

    page: int = field(default=1024, metadata={**TOKENS, "min": 16})
    recent: int = field(default=4096, metadata=TOKENS_OR_NONE)

    def cached_tokens(self, tokens: int) -> int:
        return tokens - max(0, tokens - self.recent) // self.page * self.page

    def capacity(self, tokens: int, reserve: Reserve) -> int:
        return room(self.cached_tokens(tokens), reserve.max_tokens, self.recent + self.page)


class PagedStore(Store):
    """Pages of batch slots, pads included, then one buffer with the newest slots.

        pages (elsewhere)              recent (on the device)
        |page|page|page|page|          |p p p|n n n n n n     |
        0                  paged       paged       rows.total   capacity: recent + page

    A page leaves the buffer when that holds ``recent + page`` slots. Queries read the pages block by block; the new
    tokens of a forward are read as they come, so a prompt is never brought back to be read.
    """

    note_on_cpu: ClassVar[str | None] = None

    def __init__(self, spec: Paged, heads: RoleHeads, max_tokens: int | None, home: HostMemory | Folder):
        super().__init__(spec, heads, max_tokens)
        self.home = home
        self.leaving: list[Page] | None = None  # written by `prepare` for the `append` that follows

    def _note(self, device: torch.device) -> str | None:
        return self.note_on_cpu if device.type == "cpu" else None

    @property
    def note(self) -> str | None:
        return None if self.pages is None else self.pages.note

    @property
    def word(self) -> str:
        return spec_word(self.spec)

    @property
    def limit(self) -> int | None:
        """Bytes of a layer that may be in memory at once."""
        return None

    @property
    def pages(self) -> Pages | None:
        return self.segments.get("pages")

    @property
    def paged(self) -> int:
        """Slots in pages."""
        return 0 if self.pages is None else self.pages.length

    def prepare(self, k: Tensor, v: Tensor, rows: Rows) -> None:
        k, v = self._as_kept(k, v)
        size = self.spec.page
        low = self.paged
        count = max(0, rows.total - low - self.spec.recent) // size
        starts = range(low, low + count * size, size)
        self.leaving = [self.home.write(*self._slots(k, v, rows, at, at + size)) for at in starts]

    def append(self, k: Tensor, v: Tensor, rows: Rows) -> HeadKV:
        if self.leaving is None:
            self.prepare(k, v, rows)
        k, v = self._as_kept(k, v)
        leaving = self.leaving
        self.leaving = None
        if leaving:
            self._leave(leaving, k)
        paged = self.paged
        recent = self.grow("recent", k, v, rows.total - paged, self.spec.recent + self.spec.page)
        low = max(rows.past, paged)
        self.heads.copy_to(recent.k[:, :, low - paged : rows.total - paged], k[:, :, low - rows.past :])
        self.heads.copy_to(recent.v[:, :, low - paged : rows.total - paged], v[:, :, low - rows.past :])
        recent.length = rows.total - paged
        return self._view(k, v, rows)

    def _as_kept(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values in the dtype of the first ones: blocks of one attention call cannot differ in it."""
        recent = self.segments.get("recent")
        return (k, v) if recent is None else (k.to(recent.k.dtype), v.to(recent.v.dtype))

    def _slots(self, k: Tensor, v: Tensor, rows: Rows, low: int, high: int) -> list[Tensor]:
        """k, v ``[B, n, high - low, D]`` of slots that are in the buffer or new."""
        paged = self.paged
        split = min(max(rows.past, low), high)
        parts = []
        if low < split:
            recent = self.segments["recent"]
            parts.append([x[:, :, low - paged : split - paged] for x in (recent.k, recent.v)])
        if split < high:
            parts.append([self.heads.take(x[:, :, split - rows.past : high - rows.past]) for x in (k, v)])
        return parts[0] if len(parts) == 1 else [torch.cat(pair, 2) for pair in zip(*parts, strict=True)]

    def _leave(self, leaving: list[Page], k: Tensor) -> None:
        """Take over the written pages and move what stays to the front of the buffer, in runs that do not overlap."""
        if self.pages is None:
            old = self.segments.pop("recent", None)
            self.segments["pages"] = Pages([], k.device, k.dtype, self.word, self.limit, note=self._note(k.device))
            if old is not None:
                self.segments["recent"] = old
        self.pages.entries += [Entry(page, 0, page.tokens) for page in leaving]
        recent = self.segments.get("recent")
        by = len(leaving) * self.spec.page
        if recent is None:
            return
        recent.length = max(0, recent.length - by)
        for low in range(0, recent.length, by):
            high = min(low + by, recent.length)
            for x in (recent.k, recent.v):
                x[:, :, low:high] = x[:, :, low + by : high + by]

    def _view(self, k: Tensor, v: Tensor, rows: Rows) -> HeadKV:
        """Pages of what is older than this forward, and the buffer, or the new tokens where they do not all fit it."""
        recent = self.segments["recent"]
        pages = self.pages
        if self.paged <= rows.past and not (rows.past == 0 and needs_grad(k, v)):
            own = Segment(recent.k, recent.v, recent.length)
        else:
            own = Segment(*self.incoming(k, v), rows.new)
        old = rows.total - own.length
        seen = [own] if old == 0 else [pages.first(old), own]
        bias = rows.pad_bias(k.device, own.dtype) if rows.new == 1 else None
        if bias is not None:
            own.bias, own.bias_of_pads = bias[..., old:], True
        if old:
            seen[0].bias, seen[0].padded = bias, max(rows.starts or (0,))
        return PagedKV(self.heads, seen, self.spec, state=self.state)

    def held(self, rows: Rows) -> HeadKV:
        recent = self.segments["recent"]
        own = Segment(recent.k, recent.v, recent.length)
        seen = [self.pages.first(self.paged), own] if self.paged else [own]
        return PagedKV(self.heads, seen, self.spec, state=self.state)

    def crop(self, rows: Rows, target: int) -> None:
        paged = self.paged
        recent = self.segments.get("recent")
        if target < paged:
            self.segments["pages"] = self.pages.first(target)
        if recent is not None:
            recent.length = max(0, target - paged)

    def check(self, saved: SavedStore) -> None:
        seen = saved.rows.total
        parts = saved.segments()
        if list(parts) not in (["recent"], ["pages", "recent"]):
            saved.refuse(f"its segments are {short(list(parts))}, expected pages (where there are any) and recent")
        left = seen - (Pages.check(parts["pages"], self.spec.page) if "pages" in parts else 0)
        most = self.spec.recent + self.spec.page
        if not 0 <= left <= most:
            saved.refuse(f"{left} of {seen} tokens are in no page, expected 0 to {most}")
        parts["recent"].plain(left, left, most)

    def restored(
        self, kind: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, int], device: torch.device
    ) -> Segment | Pages:
        """One of `segments` from what its `saved` gave."""
        if kind != Pages.saved_as:
            return super().restored(kind, tensors, numbers, device)
        pages = Pages.restored(tensors, numbers, device, home=self.home, name=self.word, limit=self.limit)
        pages.note = self._note(device)
        return pages

    def reset(self) -> None:
        super().reset()
        self.leaving = None

    def fork(self) -> PagedStore:
        other = super().fork()
        other.leaving = None
        return other

    def offloaded(self) -> dict[str, int]:
        return {} if self.pages is None else {self.home.place: self.pages.nbytes}
