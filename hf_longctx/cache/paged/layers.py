"""One layer of a cache in pages: its new tokens are written, and what every request reads is handed to attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout.head_pages import HeadPages
from ...layout.segments import HeadKV, Segment
from ..plan import RolePlan
from .allocators import HeadAllocator
from .kv import PagedKV
from .step import Request, Step


class RolePages:
    """The KV heads of one role in one layer, and their pages."""

    def __init__(self, role: RolePlan, layer: int, allocator: HeadAllocator):
        self.heads = role.heads
        self.spec = role.store
        self.allocator = allocator
        self.k, self.v = allocator.layer(layer)
        self.offsets = allocator.offsets(len(role.heads.kv_heads))

    def append(self, k: Tensor, v: Tensor, step: Step) -> tuple[HeadKV | None, list[HeadKV]]:
        """Write the new tokens, ``[1, H_kv, T, D]``: what is read of the decoded requests, and of each prompt.

        What prompts read is copied first: the slots of a ring are written again.
        """
        k, v = (self.heads.take(x).to(self.k.dtype) for x in (k, v))
        prompts = [self._prompt(k, v, one, step) for one in step.prompts]
        columns, rows = step.memo(("writes", id(self.allocator)), lambda: self.allocator.writes(step))
        rows = self._of_heads(step, "write", rows)
        for into, x in ((self.k, k), (self.v, v)):
            x = x[0] if columns is None else x[0].index_select(1, columns)
            into.index_copy_(0, rows, x.reshape(-1, x.shape[2]))
        return (self._decoded(step) if step.decoded else None), prompts

    def _decoded(self, step: Step) -> HeadKV:
        pages, lengths = self.allocator.tables(step)
        read = HeadPages(self.k, self.v, pages, self.offsets, lengths, self.allocator.tokens_per_page)
        return HeadKV(self.heads, [read], self.spec)

    def _prompt(self, k: Tensor, v: Tensor, request: Request, step: Step) -> HeadKV:
        new = (x[:, :, request.columns] for x in (k, v))
        if not request.past:
            return HeadKV(self.heads, [Segment(*new, request.new)], self.spec)
        reads = step.memo(("reads", request.name, id(self.allocator)), lambda: self.allocator.reads(request))
        at = self._of_heads(step, ("read", request.name), reads.rows.to(step.device))
        heads = len(self.offsets)
        cached = [x.index_select(0, at).view(1, heads, -1, x.shape[1]) for x in (self.k, self.v)]
        band = [torch.cat([old[:, :, reads.sinks :], own], 2) for old, own in zip(cached, new, strict=True)]
        part = HeadKV(self.heads, [Segment(*band, band[0].shape[2])], self.spec, first=reads.first)
        if reads.sinks:
            part.sinks = Segment(*(x[:, :, : reads.sinks] for x in cached), reads.sinks)
        return part

    def _of_heads(self, step: Step, what: object, rows: Tensor) -> Tensor:
        """The rows ``[W]`` of the first KV head as those of all, ``[n * W]``; the same in every layer."""
        count = len(self.offsets)
        key = (what, id(self.allocator), count)
        return step.memo(key, lambda: (rows + self.offsets.to(rows.device)[:, None]).flatten())


class PagedLayer:
    """The roles of one layer that have heads."""

    def __init__(self, roles: list[RolePages]):
        self.roles = roles

    def append(self, k: Tensor, v: Tensor, step: Step) -> PagedKV:
        found = [role.append(k, v, step) for role in self.roles]
        prompts = [list(parts) for parts in zip(*(prompts for _, prompts in found), strict=True)]
        return PagedKV(step, [part for part, _ in found if part is not None], prompts)
