"""Which pages a request's KV heads of one role have, and which token lies where in them.

Transformers' continuous batching gives every attention type an allocator, whose blocks have a page for each layer of
the type. Here the types are the roles, and a "layer" is a pair of a layer and one of its KV heads: a page holds tokens
of one KV head alone, so that each role has as many pages as it has heads, whatever their mix in a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cache_allocators import CacheAllocator, CachePool

from .step import Reads, Request, Step

Pair = tuple[int, int]  # a layer and one of its KV heads


class HeadAllocator(CacheAllocator):
    """Pages of the KV heads that keep every token.

        rows of the pool | keys of pair 0 | values of pair 0 | keys of pair 1 | ...     a page is `tokens_per_page` rows
                         | ------------- block of one request ----------------- |
                         | block 0 | block 1 | ... | rest |                       a sector; the rest fits no block

    Attributes:
        pairs: its layers' KV heads, those of a layer next to each other.
        shares: whether requests that begin alike may share blocks.
    """

    layer_type = "full_attention"
    supports_block_table = False
    supports_block_sharing = True
    rows_per_token = 2

    def __init__(self, index: int, pairs: Sequence[Pair], head_dim: int, dtype: torch.dtype, page: int, shares: bool):
        self.pairs = list(pairs)
        self.head_dim = head_dim
        self.cache_dtype = dtype
        page = self.page_of(page)
        self._before_cache_tensor_init(index, self.pairs, page, 2 * head_dim * dtype.itemsize * page, shares)

    def page_of(self, page: int) -> int:
        """Tokens of a page, where ``page`` were asked for."""
        return page

    def register_cache_tensor(
        self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: Tensor, pool: CachePool
    ) -> None:
        """Take a share of the pool's memory, flat bytes; nothing of it is set apart for padding."""
        self.cache_tensor = cache_tensor
        self.blocks_per_sector = bytes_per_sector // self.bytes_per_block
        self.num_blocks = non_trash_bytes // bytes_per_sector * self.blocks_per_sector
        self.num_pages = self.num_blocks * self.pages_per_block
        self.pool = pool
        self.pool.set_blocks_per_sector(self.index, self.blocks_per_sector)
        self.flat = cache_tensor.view(self.cache_dtype).view(-1, self.head_dim)
        self.rows_per_sector = bytes_per_sector // (self.head_dim * self.cache_dtype.itemsize)
        self.read_trash_index = self.write_trash_index = 0

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[N, D]`` from the pages of a layer's first KV head on."""
        first = next(at for at, (own, _) in enumerate(self.pairs) if own == layer)
        low = 2 * self.tokens_per_page * first
        return self.flat[low:], self.flat[low + self.tokens_per_page :]

    def offsets(self, heads: int) -> Tensor:
        """What the rows of each of so many KV heads lie behind those of the first, int64 ``[n]``."""
        return 2 * self.tokens_per_page * torch.arange(heads)

    def row_of(self, block: Any) -> Any:
        """First row of a block, or of each of a tensor of blocks."""
        sector, place = block // self.blocks_per_sector, block % self.blocks_per_sector
        return sector * self.rows_per_sector + place * self.block_physical_stride

    def slots(self, total: int) -> int:
        """Slots of a request's pages that its first ``total`` tokens take."""
        return total

    def slot(self, position: Any) -> Any:
        """Where the token at a position lies among a request's slots; of a tensor of positions too."""
        return position

    def stored(self, request: Request) -> Tensor:
        """Positions of the new tokens that are cached after this step."""
        return torch.arange(request.past, request.past + request.new)

    def reads(self, request: Request) -> Reads:
        """The cached tokens that the new ones of a prompt read."""
        return Reads(self.rows(request.name, torch.arange(request.past)), 0, 0)

    def rows(self, name: str, positions: Tensor) -> Tensor:
        """Rows of the first KV head's tokens at these positions of a request."""
        slots = self.slot(positions)
        table = self.row_of(torch.tensor(self.block_table[name]))
        return table[slots // self.tokens_per_page] + slots % self.tokens_per_page

    def writes(self, step: Step) -> tuple[Tensor | None, Tensor]:
        """(columns of the new tokens that are cached, None: all in order; rows of the first KV head where they go)."""
        columns, rows = [], []
        if step.decoded:
            pages, _ = self.tables(step)
            slots = self.slot(torch.tensor([one.past for one in step.decoded]))
            columns.append(torch.tensor([one.low for one in step.decoded]))
            rows.append(pages.gather(1, slots[:, None] // self.tokens_per_page)[:, 0] + slots % self.tokens_per_page)
        for one in step.prompts:
            positions = self.stored(one)
            columns.append(positions - one.past + one.low)
            rows.append(self.rows(one.name, positions))
        taken = torch.cat(columns)
        in_order = torch.equal(taken, torch.arange(step.tokens))
        return None if in_order else taken.to(step.device), torch.cat(rows).to(step.device)

    def tables(self, step: Step) -> tuple[Tensor, Tensor]:
        """(pages ``[B, W]``, lengths ``[B]``) of the decoded requests with their new tokens: see `HeadPages`."""
        return step.memo(("tables", id(self)), lambda: self._tables(step))

    def _tables(self, step: Step) -> tuple[Tensor, Tensor]:
        tables = [self.block_table[one.name] for one in step.decoded]
        width = max(map(len, tables))
        pages = torch.tensor([table + [0] * (width - len(table)) for table in tables])
        return self.row_of(pages), torch.tensor([self.slots(one.past + 1) for one in step.decoded])

    def needs_new_blocks(self, request_id: str, past_length: int, query_length: int) -> int:
        blocks = ceil(self.slots(past_length + query_length) / self.tokens_per_page)
        return max(0, blocks - len(self.block_table.get(request_id, ())))

    def allocate_cache_to_request(self, request_id: str, past_length: int, query_length: int) -> None:
        more = self.needs_new_blocks(request_id, past_length, query_length)
        table = self.block_table.setdefault(request_id, [])
        if more:
            table.extend(self.pool.get_free_blocks(self.index, more))

    def copy_blocks(self, source_block_ids: list[int], dest_block_ids: list[int]) -> None:
        rows = self.block_physical_stride
        for source, dest in zip(source_block_ids, dest_block_ids, strict=True):
            low, into = self.row_of(source), self.row_of(dest)
            self.flat[into : into + rows] = self.flat[low : low + rows]

    def get_seqlen_k(self, past_length: int, query_length: int) -> int:
        return self.slots(past_length) + query_length

    @property
    def nbytes(self) -> int:
        """Of the blocks that requests have; one that several share is counted once."""
        return self.bytes_per_block * len({block for table in self.block_table.values() for block in table})

    def _by_step(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("pages of KV heads are written and read by the cache's Step, not by index lists")

    get_read_indices = get_write_indices = fill_block_table = update = get_cache_for_block_table = _by_step


class SinkRecentAllocator(HeadAllocator):
    """Pages of the KV heads that keep the first ``sink`` tokens and the latest ``recent``, in slots as `SinkRecent`'s.

    The slots are a ring, so requests share no blocks.
    """

    layer_type = "sliding_attention"
    supports_block_sharing = False

    def __init__(
        self,
        index: int,
        pairs: Sequence[Pair],
        head_dim: int,
        dtype: torch.dtype,
        page: int,
        shares: bool,
        sink: int,
        recent: int,
    ):
        self.sink = sink
        self.recent = recent
        super().__init__(index, pairs, head_dim, dtype, page, shares)

    @property
    def window(self) -> int:
        return self.sink + self.recent

    def page_of(self, page: int) -> int:
        """As many pages as were asked for, of fewest tokens: a window of 320 in pages of 256 would waste a third."""
        return ceil(self.window / ceil(self.window / page))

    def slots(self, total: int) -> int:
        return min(total, self.window)

    def slot(self, position: Tensor) -> Tensor:
        return torch.where(position < self.sink, position, self.sink + (position - self.sink) % self.recent)

    def stored(self, request: Request) -> Tensor:
        positions = super().stored(request)
        return positions[(positions < self.sink) | (positions >= request.past + request.new - self.recent)]

    def reads(self, request: Request) -> Reads:
        low = max(self.sink, request.past - (self.recent - 1))
        if low == self.sink or request.past <= self.sink:
            return super().reads(request)
        positions = torch.cat([torch.arange(self.sink), torch.arange(low, request.past)])
        return Reads(self.rows(request.name, positions), self.sink, low)
