"""Keys and values in pages of one KV head each, of sequences of different lengths: for continuous batching."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import UnsupportedModeError
from .segments import Segment, copied
from .streamed import Streamed

BLOCK = 4096  # tokens of each KV head in a block that kernels get which read plain segments alone
KIND = "head_pages"  # what `Streamed.kind` says of it


@dataclass
class HeadPages(Streamed):
    """Token ``t`` of a sequence's KV head ``h`` lies in row ``pages[b, t // page] + heads[h] + t % page``.

        rows of k     0        4        8        12       16                    page 4, two KV heads, heads [0, 4]
                      | h0 page| h1 page| h0 page| h1 page| h0 page| h1 page|
        sequence 0    | 0 1 2 3| 0 1 2 3|                 | 4 . . .| 4 . . .|   pages [0, 16], length 5
        sequence 1                      | 0 1 . .| 0 1 . .|                     pages [8, any], length 2

    Keys may lie in another order than that of their tokens, as in a ring: no query is told from another by it.

    Attributes:
        k, v: ``[N, D]`` and ``[N, D_v]``, views of a pool of pages, which other sequences and layers share.
        pages: row where each page of a sequence begins, int64 ``[B, W]``, contiguous, in host memory; what lies behind
            the page of a sequence's last token may be anything.
        heads: what a KV head's rows lie behind those of the first, int64 ``[n]``, contiguous, in host memory.
        lengths: tokens of a sequence, at least 1, int64 ``[B]``, contiguous, in host memory.
        page: tokens of a page.
    """

    kind: ClassVar[str] = KIND
    note: ClassVar[None] = None

    k: Tensor
    v: Tensor
    pages: Tensor
    heads: Tensor
    lengths: Tensor
    page: int

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    @property
    def joined_note(self) -> str:
        raise UnsupportedModeError("decoded tokens of several requests have no keys and values of one shape to join.")

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @property
    def form(self) -> tuple[int, int, int]:
        return len(self.lengths), len(self.heads), self.k.shape[1]

    def blocks(self) -> Iterator[Segment]:
        """Copies as long as the longest sequence, in which a bias of -inf hides what a shorter one has not."""
        device = self.k.device
        dtype = torch.promote_types(self.dtype, torch.float32)
        for low in range(0, self.longest, BLOCK):
            slots = torch.arange(low, min(low + BLOCK, self.longest))
            hidden = slots >= self.lengths[:, None]
            at = (self.pages[:, slots // self.page] + slots % self.page).masked_fill(hidden, 0)
            at = (at[:, None] + self.heads[:, None]).to(device)
            hidden = hidden[:, None].to(device)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
            yield copied(self.k, self.v, at, hidden, bias)

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.k, self.v, self.pages, self.heads, self.lengths)
