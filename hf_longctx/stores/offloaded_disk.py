"""``store: offloaded_disk``: every token is kept, the older ones in files: a context may be larger than memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..errors import CacheError
from ..layout.heads import RoleHeads
from ..layout.rows import Rows
from ._page import Folder
from ._paged import Paged, PagedStore

READING = 4  # pages in memory while one is read: it and the one before, mapped or copied, and room for what they need


@dataclass(frozen=True)
class OffloadedDisk(Paged):
    """Cache every token: the newest in memory, the others in pages in memory-mapped files.

    Attributes:
        resident: bytes that one layer may have in memory at once, its buffer and pages; a forward that needs more is
            refused before it writes.
        folder: where a sub-folder is made for each layer of a cache, which goes with it; none: the system's folder for
            temporary files.
    """

    places: ClassVar[tuple[str, ...]] = ("resident", "folder")

    resident: int = field(default=2**30, metadata={"min": 1, "max": 2**50, "unit": "bytes"})
    folder: str | None = field(default=None, metadata={"path": True})

    def new(self, heads: RoleHeads, max_tokens: int | None) -> OffloadedDiskStore:
        return OffloadedDiskStore(self, heads, max_tokens, Folder(self.folder))

    def needed(self, slot: int) -> int:
        """Bytes in memory at once, where a slot of all rows and heads takes ``slot``: most while the buffer grows."""
        return max(2 * (self.recent + self.page), self.recent + self.page + READING * self.page) * slot


class OffloadedDiskStore(PagedStore):
    """Pages in files."""

    @property
    def limit(self) -> int:
        return self.spec.resident

    def prepare(self, k: Tensor, v: Tensor, rows: Rows) -> None:
        number = k.element_size()
        spec = self.spec
        slot = k.shape[0] * len(self.heads.kv_heads) * (k.shape[3] + v.shape[3]) * number
        if (needed := spec.needed(slot)) > spec.resident:
            fits = min(spec.resident // slot // 2 - spec.page, spec.resident // slot - (1 + READING) * spec.page)
            or_less = f", or recent to at most {fits}" if fits >= 0 else ", or make page smaller"
            raise CacheError(
                f"stores.retrieval.resident is {spec.resident} bytes, and a layer of {k.shape[0]} rows needs {needed} "
                f"with recent {spec.recent} and page {spec.page}. Set resident to at least {needed}{or_less}."
            )
        super().prepare(k, v, rows)
