"""``select: few_pages``: the pages whose mean key is most alike the query."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..kernels.reference import products
from ..layout.gather import keys
from .base import Cached, Index, Select


@dataclass(frozen=True)
class FewPages(Select):
    """Read the pages whose mean key has the highest product with the query.

    Attributes:
        page: tokens of a page.
    """

    cases = ({"page": 8, "budget": 16},)

    page: int = field(default=16, metadata={"min": 1, "max": 128, "unit": "tokens"})

    @property
    def size(self) -> int:
        return self.page

    def scores(self, q: Tensor, index: Index, cached: Cached, low: int, high: int, scale: float) -> Tensor:
        k = keys(cached, low * self.page, high * self.page).unflatten(2, (-1, self.page)).mean(3)
        return products(q, k) * scale
