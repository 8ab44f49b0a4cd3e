"""Blocks of streaming heads with sinks: the blocks of the first tokens stay, those that left the window are freed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """A sliding window whose first ``sink`` tokens stay.

    Attributes:
        sink: first tokens of a request; at least 1.
    """

    sink: int

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Blocks that a request holds at most: those of its window, and those of its sinks."""
        window = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(window + self.sink_blocks, cdiv(max_model_len, self.block_size) + 1)

    @property
    def sink_blocks(self) -> int:
        """Blocks that hold the sinks."""
        return cdiv(self.sink, self.block_size)


class SinkWindowManager(SlidingWindowManager):
    """Frees what lies between the blocks of the sinks and those of the window, and shares both with other requests.

    A prefix that another request has read is taken over where the blocks of its sinks and of the window at its end are
    still there; `SlidingWindowManager` would take the window alone.
    """

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks behind the sinks of which no token is in the window of the next one."""
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, self.kv_cache_spec.sink_blocks, skipped)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: SinkWindowSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        **sizes: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prefix whose window is there and whose sinks are; where a sink is missing it ends before that."""
        block = kv_cache_spec.block_size
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            block,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        wanted = range(min(kv_cache_spec.sink_blocks, max_length // block))
        cached = (block_pool.get_cached_block(hashes[i], kv_cache_group_ids) for i in wanted)
        sinks = list(itertools.takewhile(bool, cached))
        if len(sinks) < len(wanted):
            max_length = len(sinks) * block
        given = (kv_cache_group_ids, block_pool, kv_cache_spec, drop_eagle_block, alignment_tokens)
        hit, length = super().find_longest_cache_hit(block_hashes, max_length, *given, **sizes)
        for blocks, own in zip(hit, zip(*sinks, strict=True), strict=False):  # no sinks: nothing to put in
            blocks[: len(own)] = own[: len(blocks)]
        return hit, length

    @classmethod
    def reachable_block_mask(
        cls, start_block: int, end_block: int, alignment_tokens: int | None, kv_cache_spec: SinkWindowSpec, **given: Any
    ) -> list[bool] | None:
        """Which blocks other requests may take over: those of a sliding window, and those of the sinks."""
        mask = super().reachable_block_mask(start_block, end_block, alignment_tokens, kv_cache_spec, **given)
        sinks = max(0, min(end_block, kv_cache_spec.sink_blocks) - start_block)
        return None if mask is None else [True] * sinks + mask[sinks:]

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *rest: Any,
        **more: Any,
    ) -> int:
        """Blocks that leave the free ones: those of a sliding window, and those of sinks that are taken over."""
        given = (request_id, num_tokens, new_computed_blocks, total_computed_tokens)
        sinks = self._sinks_behind(new_computed_blocks, total_computed_tokens)
        return super().get_num_blocks_to_allocate(*given, *rest, **more) + self._get_num_evictable_blocks(sinks)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take over a prefix, its sinks as well."""
        computed = (num_local_computed_tokens, num_external_computed_tokens)
        sinks = self._sinks_behind(new_computed_blocks, sum(computed))
        super().add_local_computed_blocks(request_id, new_computed_blocks, *computed)
        self.block_pool.touch(sinks)
        self.req_to_blocks[request_id][: len(sinks)] = sinks

    def _sinks_behind(self, blocks: Sequence[KVCacheBlock], computed: int) -> Sequence[KVCacheBlock]:
        """Blocks of the sinks that a sliding window would have left behind after ``computed`` tokens."""
        return blocks[: min(self.kv_cache_spec.sink_blocks, self.get_num_skipped_tokens(computed) // self.block_size)]


def register() -> None:
    """Tell vLLM which manager the spec has; again is no harm."""
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # vLLM's own specs register only while the table is empty
    KVCacheSpecRegistry.register(SinkWindowSpec, SinkWindowManager)
