"""The cache of continuous batching: pages of single KV heads, of which each role keeps what it needs.

Transformers' manager, scheduler and samplers run as they are; the cache says which blocks a request needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache, PagedAttentionMemoryHandler
from transformers.generation.continuous_batching.cache_allocators import CachePool

from ...errors import CacheError
from ...layout.forward import BatchingCounts, ForwardLog
from ...layout.huge_pages import in_huge_pages
from ..plan import LayerPlan
from .allocators import HeadAllocator, Pair, SinkRecentAllocator
from .kv import PagedKV, StepCache
from .layers import PagedLayer, RolePages
from .step import Request, Step

MOST_BLOCKS = 64  # of the role with the larger blocks, in a sector
LARGE = 1 << 30  # bytes of a pool that is as large as memory allows, at least


class HeadPagedCache(StepCache, PagedAttentionCache):
    """Keys and values of many requests, in pages of one KV head each.

    Attributes:
        plans: of the model's layers.
        nbytes: of the blocks that requests have now.
        counts: what was added up in all steps.
    """

    def __init__(
        self,
        plans: Sequence[LayerPlan],
        config: PreTrainedConfig,
        cb_config: ContinuousBatchingConfig,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        logits_to_keep: bool,
    ):
        self.plans = tuple(plans)
        self.config = config
        self.device = device
        self.dtype = dtype
        self.head_dim = head_dim
        self.page_size = cb_config.page_size
        self.max_blocks_per_request = 0
        self.allow_block_sharing = cb_config.allow_block_sharing
        self.cache_allocators = self._allocators(cb_config)
        self.use_prefix_sharing = all(one.use_block_sharing for one in self.cache_allocators.values())
        bytes_per_block = cb_config.page_size * self._dense_bytes
        pool = LARGE if cb_config.num_blocks is None else cb_config.num_blocks * bytes_per_block
        self.bytes_per_sector = sector_bytes([one.bytes_per_block for one in self.cache_allocators.values()], pool)
        self.tokens_per_sector = max(
            self.bytes_per_sector // one.bytes_per_block * one.tokens_per_page for one in self.cache_allocators.values()
        )
        self.max_batch_tokens, self.num_sectors = self._sizes(cb_config, bytes_per_block, logits_to_keep)
        self._take_memory()
        self.num_blocks = self.num_sectors * self.bytes_per_sector // bytes_per_block
        self.read_cache_limit = self._infer_read_cache_limit()
        self.max_decode_fast_path_length = 0
        self.max_tokens_read = max(one.tokens_per_page * one.num_blocks for one in self.cache_allocators.values())
        self.layers = [self._layer(plan) for plan in self.plans]
        self.counts = BatchingCounts()
        self._lengths: dict[str, int] = {}  # tokens of each request that has blocks
        self._requests: list[Request] = []
        self._step: Step | None = None

    @property
    def _dense_bytes(self) -> int:
        """Of one token, if every KV head kept it."""
        return 2 * self.head_dim * self.dtype.itemsize * sum(plan.kv_heads for plan in self.plans)

    def _allocators(self, cb_config: ContinuousBatchingConfig) -> dict[str, HeadAllocator]:
        allocators: dict[str, HeadAllocator] = {}
        for name, kind in (("retrieval", HeadAllocator), ("streaming", SinkRecentAllocator)):
            roles = [(plan.layer_idx, plan.role(name)) for plan in self.plans]
            pairs: list[Pair] = [(layer, head) for layer, role in roles for head in role.heads.kv_heads]
            if not pairs:
                continue
            given = (pairs, self.head_dim, self.dtype, cb_config.page_size, cb_config.allow_block_sharing)
            store = roles[0][1].store
            window = () if kind is HeadAllocator else (store.sink, store.recent)
            allocators[kind.layer_type] = kind(len(allocators), *given, *window)
        return allocators

    def _sizes(
        self, cb_config: ContinuousBatchingConfig, bytes_per_block: int, logits_to_keep: bool
    ) -> tuple[int, int]:
        """(tokens of a step, sectors), by the config or by the memory that there is."""
        handler = PagedAttentionMemoryHandler(
            config=self.config,
            cb_config=cb_config,
            dtype=self.dtype,
            bytes_per_sector=self.bytes_per_sector,
            tokens_per_sector=self.tokens_per_sector,
            bytes_per_block=bytes_per_block,
            attn_types=list(self.cache_allocators),
            model_supports_logits_to_keep=logits_to_keep,
        )
        handler.num_attention_masks = 0  # masks are never made
        return handler.infer_max_batch_tokens_and_num_sectors()

    def _take_memory(self) -> None:
        nbytes = self.num_sectors * self.bytes_per_sector
        # Not filled: a CPU takes the memory of pages as they are written.
        self.cache_tensor = in_huge_pages(torch.empty(nbytes, dtype=torch.uint8, device=self.device))
        self.pool = CachePool(self.num_sectors, len(self.cache_allocators), num_reserved_sectors=0)
        for allocator in self.cache_allocators.values():
            allocator.register_cache_tensor(self.bytes_per_sector, nbytes, self.cache_tensor, self.pool)

    def _infer_read_cache_limit(self) -> int | None:
        streaming = self.cache_allocators.get(SinkRecentAllocator.layer_type)
        return streaming.window if streaming is not None and len(self.cache_allocators) == 1 else None

    def _layer(self, plan: LayerPlan) -> PagedLayer:
        kinds = {"retrieval": HeadAllocator.layer_type, "streaming": SinkRecentAllocator.layer_type}
        roles = [RolePages(role, plan.layer_idx, self.cache_allocators[kinds[role.heads.role]]) for role in plan.filled]
        return PagedLayer(roles)

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.cache_allocators.values())

    def fits(self, tokens: int) -> bool:
        """Whether one request of so many tokens would have pages, if there were no other."""
        sectors = 0
        for allocator in self.cache_allocators.values():
            blocks = ceil(allocator.slots(tokens) / allocator.tokens_per_page)
            sectors += ceil(blocks / allocator.blocks_per_sector)
        return sectors <= self.num_sectors

    def extend_read_and_write_indices(
        self,
        request_id: str,
        past_length: int,
        query_length: int,
        read_index: list[list[int]] | None,
        write_index: list[list[int]],
    ) -> None:
        """Note a request of the next step. Its tokens are found in its pages by the step, not by lists of indexes."""
        if not write_index[0]:  # the lists of every step are new ones
            self._requests = []
            self._step = None
        low = self._requests[-1].columns.stop if self._requests else 0
        self._requests.append(Request(request_id, past_length, query_length, low))
        write_index[0].append(0)

    def begin(self, log: ForwardLog) -> Step:
        """The step of the requests that were noted, before its first layer."""
        self._step = Step(self._requests, self.device, log)
        some = next(iter(self.cache_allocators.values()))
        lengths = self._lengths | {one.name: one.past + one.new for one in self._requests}
        self._lengths = {name: length for name, length in lengths.items() if name in some.block_table}
        for counts in (self.counts, log.batching):
            counts.add(len(self._lengths), self.nbytes, self._dense_bytes * sum(self._lengths.values()))
        return self._step

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any] | None = None
    ) -> tuple[PagedKV, PagedKV]:
        """Write the new tokens ``[1, H_kv, T, D]`` of a layer; what its attention reads, in place of both.

        Raises:
            CacheError: the forward did not come through the hooks of a patched model.
        """
        if self._step is None:
            raise CacheError(
                "the model was unpatched, or switched to another attention, since this manager of continuous batching "
                "was made. Start a new one; where it was kept (persistent_manager), call "
                "model.destroy_cached_continuous_batching_manager() before."
            )
        kv = self.layers[layer_idx].append(key_states, value_states, self._step)
        return kv, kv


def sector_bytes(blocks: Sequence[int], pool: int) -> int:
    """Bytes of a sector for blocks of these sizes: what loses least of a pool.

    Sectors go from one role to the other as requests come and go, so blocks of both must fit in one, and the rest of it
    is lost. Of the last sector that a role took, some is free: the larger sectors are, the more.
    """
    most = max(blocks)

    def lost(size: int) -> float:
        return max(size % block for block in blocks) / size + (len(blocks) - 1) * size / pool

    return min((count * most for count in range(1, MOST_BLOCKS + 1)), key=lost)
