"""``store: offloaded``: every token is kept, the older ones in host memory, from where a GPU reads them by pages."""

from __future__ import annotations

from dataclasses import dataclass

from ..layout.heads import RoleHeads
from ._page import HostMemory
from ._paged import Paged, PagedStore
from .base import Bytes, Reserve


@dataclass(frozen=True)
class Offloaded(Paged):
    """Cache every token: the newest on the device, the others in pages in host memory.

    A GPU copies the pages while it computes, one ahead of the reader. On a CPU it is the same memory: nothing is saved.
    """

    def new(self, heads: RoleHeads, max_tokens: int | None) -> OffloadedStore:
        return OffloadedStore(self, heads, max_tokens, HostMemory())

    def nbytes(self, tokens: int, head_dim: int, itemsize: int, reserve: Reserve | None = None) -> Bytes:
        paged = tokens - self.cached_tokens(tokens)
        return super().nbytes(tokens, head_dim, itemsize, reserve)._replace(host=2 * paged * head_dim * itemsize)


class OffloadedStore(PagedStore):
    """Pages in host memory."""

    note_on_cpu = "store offloaded: the model runs on the CPU, so its pages are in the same memory: no saving"
