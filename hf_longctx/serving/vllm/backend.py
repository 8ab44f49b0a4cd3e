"""Attention of streaming heads with sinks on a CPU: an attention layer of vLLM, its backend, and what a step reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec, replace_as

from . import window
from .kv_cache import SinkWindowSpec
from .window import Piece, Rule


class SinkAttention(Attention):
    """KV heads that read the first ``sink`` and the latest ``recent`` tokens."""

    def __init__(self, *sizes: Any, sink: int, recent: int, **given: Any) -> None:
        super().__init__(*sizes, per_layer_sliding_window=recent, attn_backend=SinkWindowBackend, **given)
        self.sink = sink

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """The spec of a sliding window, with the sinks."""
        return replace_as(super().get_kv_cache_spec(vllm_config), SinkWindowSpec, sink=self.sink)


class SinkWindowBackend(CPUAttentionBackend):
    """Blocks are those of vLLM's own CPU backend; keys and values stand in them as `window` has them."""

    @staticmethod
    def get_name() -> str:
        """The name that vLLM leaves to backends of others."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SinkWindowImpl]:
        """What computes attention."""
        return SinkWindowImpl

    @staticmethod
    def get_builder_cls() -> type[SinkWindowBuilder]:
        """What plans a step."""
        return SinkWindowBuilder


@dataclass(frozen=True)
class SinkWindowMetadata:
    """What a step reads, the same for every layer of a group.

    Attributes:
        pieces: the queries and their keys.
    """

    pieces: tuple[Piece, ...]


class SinkWindowBuilder(AttentionMetadataBuilder[SinkWindowMetadata]):
    """Plans what the requests of a step read."""

    def __init__(self, kv_cache_spec: SinkWindowSpec, layer_names: list[str], *rest: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, *rest)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SinkWindowMetadata:
        """The plan of a step."""
        step = common_attn_metadata
        spec = self.kv_cache_spec
        rule = Rule(spec.sink, spec.sliding_window)
        return SinkWindowMetadata(
            window.plan(step.query_start_loc, step.seq_lens, step.block_table_tensor, spec.block_size, rule)
        )


class SinkWindowImpl(AttentionImpl[SinkWindowMetadata]):
    """Attention of the plan."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        *rest: Any,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.scale = scale
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype

    def forward(
        self,
        layer: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SinkWindowMetadata | None,
        output: Tensor,
        *rest: Any,
        **more: Any,
    ) -> Tensor:
        """Write the attention of ``query`` to ``output``; of a forward that only measures memory, zeros."""
        if attn_metadata is None:
            return output.zero_()
        window.attend(query, kv_cache, attn_metadata.pieces, self.scale, output)
        return output

    def do_kv_cache_update(
        self, layer: Attention, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Put the new tokens into the blocks."""
        window.write(kv_cache, key, value, slot_mapping)
