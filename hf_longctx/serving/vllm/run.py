"""What the plugin refuses of a run of vLLM and of an attention layer, in a sentence, before weights are loaded."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModeError, UnsupportedModelError
from .roles import HeadRoles


def refuse_run(vllm_config: Any, roles: HeadRoles, on_cpu: bool) -> None:
    """Raise UnsupportedModeError for what is not tried with split heads, or gives wrong tokens.

    Args:
        vllm_config: vLLM's ``VllmConfig``.
        on_cpu: whether it runs on a CPU.
    """
    parallel = vllm_config.parallel_config
    never = (
        (
            parallel.world_size > 1,
            "tensor and pipeline parallel are not tried",
            "one process: --tensor-parallel-size 1",
        ),
        (
            parallel.decode_context_parallel_size > 1,
            "context parallel is not tried",
            "no --decode-context-parallel-size",
        ),
        (parallel.data_parallel_size > 1, "data parallel is not tried", "one process: --data-parallel-size 1"),
        (vllm_config.speculative_config, "speculative decoding is not tried", "no --speculative-config"),
        (vllm_config.kv_transfer_config, "a KV connector is not tried", "no --kv-transfer-config"),
        (vllm_config.lora_config, "LoRA is not tried", "no --enable-lora"),
        (vllm_config.model_config.runner_type != "generate", "pooling is not tried", "--runner generate"),
        (
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager,
            "without the hybrid KV cache manager every head caches every token",
            "no --disable-hybrid-kv-cache-manager",
        ),
    )
    sinks = roles.sink > 0 and "S" in "".join(roles.rows)
    device = (sinks and not on_cpu, "sinks have no attention on this device yet", "a CPU, or a config of no sinks")
    for given, why, works in (*never, device):
        if given:
            raise UnsupportedModeError(f"hf_longctx's plugin of vLLM: {why}. What works: {works}.")


def refuse_layer(attention: Any) -> None:
    """Raise UnsupportedModelError for an attention layer of vLLM that is not just causal attention over every token."""
    own = {
        "a sliding window": attention.sliding_window,
        "ALiBi": getattr(attention.impl, "alibi_slopes", None),
        "soft-capped scores": getattr(attention.impl, "logits_soft_cap", None),
        "learned sinks": attention.has_sink,
        "KV of another layer": attention.kv_sharing_target_layer_name,
        f"a KV cache of {attention.kv_cache_dtype}": attention.kv_cache_dtype != "auto",
        f"attention of an {attention.attn_type}": attention.attn_type != "decoder",
    }
    for name, has in own.items():
        if has:
            raise UnsupportedModelError(
                f"hf_longctx's plugin of vLLM: {attention.layer_name} has {name}. "
                "What works: layers that read every token, with softmax alone, and cache it in the model's dtype."
            )
