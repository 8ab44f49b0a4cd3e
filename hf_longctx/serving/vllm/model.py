"""A model of vLLM with an attention layer per KV head, so that vLLM gives each head the blocks it needs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from ...errors import UnsupportedModelError
from .roles import HeadRoles, head_roles
from .run import refuse_layer, refuse_run

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is below its own name


class HeadSplit(nn.Module):
    """In place of the attention of a layer: an `Attention` per KV head, ``head0`` and so on.

    Args:
        whole: the attention that it stands in for, which must not be used any more.
        roles: the layer's row of `HeadRoles.rows`.
        rule: what streaming heads read.
    """

    def __init__(self, whole: Attention, roles: str, rule: HeadRoles, vllm_config: VllmConfig) -> None:
        super().__init__()
        sizes = (whole.num_heads // whole.num_kv_heads, whole.head_size, whole.impl.scale)
        given = {"cache_config": vllm_config.cache_config, "quant_config": vllm_config.quant_config, "num_kv_heads": 1}
        vllm_config.compilation_config.static_forward_context.pop(whole.layer_name)
        self.heads = nn.ModuleList(
            _attention(role, rule, *sizes, prefix=f"{whole.layer_name}.head{head}", **given)
            for head, role in enumerate(roles)
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The attention of all heads, side by side as `Attention` gives it."""
        parts = (x.chunk(len(self.heads), -1) for x in (query, key, value))
        return torch.cat([head(q, k, v) for head, q, k, v in zip(self.heads, *parts, strict=True)], -1)


def _attention(role: str, rule: HeadRoles, *sizes: Any, **given: Any) -> Attention:
    if role == "R":
        return Attention(*sizes, **given)
    if not rule.sink:
        return Attention(*sizes, per_layer_sliding_window=rule.recent, **given)
    from .backend import SinkAttention  # of a CPU alone

    return SinkAttention(*sizes, sink=rule.sink, recent=rule.recent, **given)


class SplitHeads:
    """Mixed into a model class of vLLM: after it is built, every attention layer is split by KV head.

    Attributes:
        named: the config, as ``HF_LONGCTX_VLLM`` names it.
    """

    named: str

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        model = vllm_config.model_config
        roles = head_roles(self.named, model.hf_config, model.model)
        refuse_run(vllm_config, roles, current_platform.is_cpu())
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for layer, row in zip(self.model.layers, roles.rows, strict=True):
            refuse_layer(layer.self_attn.attn)
            layer.self_attn.attn = HeadSplit(layer.self_attn.attn, row, roles, vllm_config)
        logger.info("hf_longctx (an experiment): %s", roles)
        if not current_platform.is_cpu():
            logger.warning("hf_longctx's plugin has only been run on CPUs: compare its answers before you trust them")


@functools.cache
def split(cls: type[nn.Module], architecture: str, named: str) -> type[nn.Module]:
    """The class with `SplitHeads`, under the config that ``named`` names.

    Raises:
        UnsupportedModelError: the architecture is none of `FAMILIES`.
    """
    if architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"hf_longctx's plugin of vLLM: got {architecture}. What works: {', '.join(FAMILIES)}. "
            "Unset HF_LONGCTX_VLLM to run this model as vLLM does."
        )
    return type(f"Split{cls.__name__}", (SplitHeads, cls), {"named": named, "__module__": cls.__module__})
