"""Blocks of streaming heads with sinks: the blocks of the first tokens stay, those that left the window are freed."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.utils.math_utils import cdiv
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
        return min(window + cdiv(self.sink, self.block_size), cdiv(max_model_len, self.block_size) + 1)


class SinkWindowManager(SlidingWindowManager):
    """Frees what lies between the blocks of the sinks and those of the window."""

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks behind the sinks of which no token is in the window of the next one."""
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, cdiv(self.kv_cache_spec.sink, self.block_size), skipped)


def register() -> None:
    """Tell vLLM which manager the spec has; again is no harm."""
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # vLLM's own specs register only while the table is empty
    KVCacheSpecRegistry.register(SinkWindowSpec, SinkWindowManager)
