"""``select: page_bounds``: read the pages whose keys could give the highest scores.

Quest, arXiv:2406.10774, over the pages of LServe, arXiv:2502.14866, which owe their bounds to smaller ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.base import page_chooser
from ..kernels.reference import page_scores
from ..layout.gather import key_pieces
from ._growing import Growing, room
from .base import Cached, Index, Select


@dataclass(frozen=True)
class PageBounds(Select):
    """Read the pages in which a key may have the highest score, as far as the page's bounds tell.

    The score of a page is the largest that a key within its bounds could have: no key of it has a higher one. The query
    heads of a KV head choose together, by the highest of their scores, so each key is read once; Quest chooses for
    every query head by itself.

    Attributes:
        page: tokens of a page.
        sub: a page is this many smaller ones with bounds of their own; its score is the highest of theirs.
        vote: how the query heads of a KV head choose together: by their highest score, their mean, or the sum of their
            softmax over the pages.
    """

    cases: ClassVar = (
        {"page": 8, "budget": 16},
        {"page": 16, "sub": 4, "budget": 32, "refresh": 4},
        {"page": 8, "budget": 40, "mass": 0.8, "vote": "softmax"},
        {"page": 8, "share": 0.2, "similar": 0.5, "refresh": 32, "vote": "mean"},
    )

    page: int = field(default=16, metadata={"min": 1, "max": 128, "unit": "tokens"})
    sub: int = field(default=1, metadata={"min": 1, "max": 128, "unit": "parts"})
    vote: str = field(default="max", metadata={"choices": ("max", "mean", "softmax")})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page % self.sub:
            raise ConfigError(f"sub: got {self.sub}, expected a number that divides page, {self.page}.")

    @property
    def size(self) -> int:
        return self.page

    @property
    def votes(self) -> str:
        return self.vote

    def new_index(self) -> Bounds:
        return Bounds(self.page // self.sub)

    def nbytes(self, tokens: int, head_dim: int, itemsize: int, max_tokens: int | None = None) -> int:
        _, high = self.between(tokens - 1)
        most = None if max_tokens is None else max_tokens // (self.page // self.sub)
        return 2 * room(high * self.sub, most) * head_dim * itemsize

    def scores(self, q: Tensor, index: Bounds, cached: Cached, low: int, high: int, scale: float) -> Tensor:
        found = torch.cat([page_scores(q, part) for part in index.pages.views(low * self.sub, high * self.sub)], 2)
        return found.unflatten(2, (-1, self.sub)).amax(3) * scale

    def pick(
        self, q: Tensor, index: Bounds, cached: Cached, low: int, high: int, width: int, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        if self.vote == "max" and self.mass is None:
            bounds = index.pages.views(low * self.sub, high * self.sub)
            ours = index.chooser(q)
            if ours is not None and (chosen := ours(q, bounds, self.sub, width)) is not None:
                return chosen, None
        return super().pick(q, index, cached, low, high, width, scale)


class Bounds(Index):
    """The largest and the smallest number of each channel, of the keys of each page.

    Attributes:
        page: tokens of a page.
        pages: largest, then smallest, ``[B, n, P, 2 D]``.
    """

    def __init__(self, page: int):
        self.page = page
        self.pages = Growing()
        self.choosers: dict[tuple, Any] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "choosers": {}}

    def chooser(self, q: Tensor) -> Callable[..., Tensor | None] | None:
        """The function of a kernel that chooses pages for such queries; asked once."""
        key = (q.dtype, q.device)
        if key not in self.choosers:
            self.choosers[key] = page_chooser(self.kernel, q)
        return self.choosers[key]

    @property
    def tokens(self) -> int:
        return self.pages.length * self.page

    def extend(self, cached: Cached, tokens: int) -> None:
        high = tokens // self.page * self.page
        most = None if self.max_tokens is None else self.max_tokens // self.page
        for first, k in key_pieces(cached, self.tokens, high, self.page):
            k = k.unflatten(2, (-1, self.page))
            more = (high - first) // self.page - k.shape[2]
            self.pages.append(torch.cat([k.amax(3), k.amin(3)], 3), more, most)

    def crop(self, tokens: int) -> None:
        self.pages.crop(tokens // self.page)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.pages.map_rows(change)

    def fork(self) -> Bounds:
        other = Bounds(self.page)
        other.pages = self.pages.fork()
        return other

    def tensors(self) -> Iterator[Tensor]:
        yield from self.pages.tensors()
