"""The plan of every attention layer, from a config."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..cache.plan import LayerPlan, PrefillPlan
from ..config.config import LongCtxConfig
from ..config.head_map import slice_roles
from ..layout.rotation import Rotation
from ..prefill.base import PatternSpec
from ..stores.sink_recent import SinkRecent
from .family import Family
from .modules import tensor_parallel
from .rotary import rotations


def make_plan(
    module: nn.Module, settings: LongCtxConfig, family: Family, hf_config: Any, rotation: Rotation | None = None
) -> LayerPlan:
    """The plan of one attention module: the roles of the KV heads that this process holds, stores and patterns."""
    layer = module.layer_idx
    roles = settings.roles()[layer]
    rank, size = tensor_parallel(module, family, len(roles))
    if size > 1:
        roles = slice_roles(roles, rank, size)
    stores = {"retrieval": settings.stores.retrieval, "streaming": settings.stores.streaming}
    window = family.window(hf_config, layer)
    if window is None:
        patterns = query_patterns(settings, layer)
        step = len(patterns) // size
        prefill = make_prefill(settings, roles, patterns[rank * step : (rank + 1) * step])
        more = {"prefill": prefill, "decode": settings.decode.retrieval}
        more["dense_tail"] = settings.prefill.streaming.dense_tail
        more["rotation"] = rotation
    else:
        roles = "S" * len(roles)
        more = {"window": window}
        stores = dict.fromkeys(stores, SinkRecent(sink=0, recent=window))
    return LayerPlan.of(layer, roles, stores, settings.kernel, scores=family.scores, **more)


def asks_rotation(settings: LongCtxConfig) -> bool:
    """Whether the store of retrieval heads has a score that turns queries or keys."""
    return getattr(getattr(settings.stores.retrieval, "rule", None), "rotates", False)


def make_rotations(base: PreTrainedModel, settings: LongCtxConfig, family: Family) -> dict[int, Rotation]:
    """The rotations of the layers that have retrieval heads, as `rotations`; ``base`` is not patched."""
    letters = enumerate(settings.roles())
    read = [layer for layer, roles in letters if "R" in roles and family.has_roles(base.config, layer)]
    return rotations(base, [layer for layer in read if family.window(base.config, layer) is None])


def query_patterns(settings: LongCtxConfig, layer: int) -> tuple[PatternSpec, ...]:
    """The prefill pattern of every query head of a layer, on all processes together."""
    table = settings.prefill.table
    if table is None:
        return (settings.prefill.retrieval,) * settings.model.num_attention_heads
    return tuple(table.budgets[index] for index in table.map[layer])


def make_prefill(settings: LongCtxConfig, roles: str, patterns: tuple[PatternSpec, ...]) -> PrefillPlan | None:
    """The prefill plan of a layer's (or slice's) retrieval heads; None where all of them read densely."""
    group = len(patterns) // len(roles)
    kept = tuple(spec for head, spec in enumerate(patterns) if roles[head // group] == "R")
    if all(spec.reads_all for spec in kept):
        return None
    return PrefillPlan(kept, settings.prefill.min_tokens, settings.prefill.share_groups)
