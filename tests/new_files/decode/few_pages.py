"""``select: few_pages``: a selection that nothing runs yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from .base import SelectSpec


@dataclass(frozen=True)
class FewPages(SelectSpec):
    """Read a few pages.

    Attributes:
        pages: how many.
    """

    roles = ("retrieval",)

    pages: int = field(default=2, metadata={"min": 1, "max": 2**20, "unit": "pages"})
