"""A decoded token of a patched model as ``torch.compile`` sees it: operators without insides.

Compiled code is fixed; lengths, pads and caches are not. What decides by them runs as ever, inside of two operators:

    begin(cache, patch, ids, mask, positions)   the checks before a forward; gives the positions of the tokens
    decode_layer(q, k, v, cache, layer, scale)  the layer's new keys are cached and its heads attend

so there is one graph for every length and every cache. Both are told that they change the handle by which they find the
cache, and so they stay in their order. CUDA graphs are recorded around them, not through them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..cache.cache import LongCtxCache
from ..cache.handles import cache_of, held_by
from ..cache.seam import CACHE, rename_cache
from ..errors import UnsupportedModeError
from ..layout.dtypes import autocast_on
from ..layout.scores import Scores
from .as_stock import padding_of
from .attention import FORWARD, NAME, attend_cached
from .state import PatchState

READ = ("input_ids", "attention_mask", "position_ids", CACHE)
TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


class TracedCache:
    """What stands for a cache within a compiled forward: keys and values go through it untouched."""

    is_compileable = False

    def __init__(self, cache: LongCtxCache):
        self.cache = cache

    def update(self, k: Tensor, v: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return k, v

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """No number that changes: positions are given, and older versions of Transformers count places by it."""
        return 0


def traced_call(base: nn.Module, given: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a compiled decode step; None for any other forward, at which the graph breaks.

    Args:
        given: the arguments of the base model's forward, by name.
    """
    given = dict(given)
    rename_cache(given)
    cache = given.get(CACHE)
    ids = given.get("input_ids")
    mask = padding_of(given.get("attention_mask"))
    more = [name for name, value in given.items() if name not in READ and value is not None and value is not False]
    if not isinstance(cache, LongCtxCache) or not isinstance(ids, Tensor) or ids.shape[1] != 1:
        return None
    if mask is not None and not isinstance(mask, Tensor):
        return None
    if base.training or autocast_on(ids) or not set(more) <= {"use_cache", "cache_position"}:
        return None
    if given.get("use_cache") is False or base.config._attn_implementation != NAME or not base.longctx_state.compiles:
        return None
    handle = cache.handle
    positions = torch.ops.hf_longctx.begin(handle, base.longctx_state.handle, ids, mask, given.get("position_ids"))
    # A mask of four dimensions is taken by models as it is, and none of its numbers is read.
    traced = {"attention_mask": handle.view(1, 1, 1, 1), "position_ids": positions, CACHE: TracedCache(cache)}
    return {**given, **traced, FORWARD: handle}


class GiveCacheBack:
    """Forward hook of the base model: in what a compiled forward returns the cache stands again."""

    def __call__(self, base: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(one.cache if isinstance(one, TracedCache) else one for one in output)
        if isinstance(traced := getattr(output, CACHE, None), TracedCache):
            output[CACHE] = traced.cache
        return output


@torch.library.custom_op("hf_longctx::begin", mutates_args={"handle"}, tags=TAGS)
def begin(handle: Tensor, patch: Tensor, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
    """Positions int64 ``[B, 1]`` of the tokens ``ids [B, 1]``, or those that were given."""
    cache = cache_of(handle)
    base = _patched_base(held_by(patch), cache)
    before = next(hook for hook in base._forward_pre_hooks.values() if hasattr(hook, "prepare"))
    given = dict(zip(READ, (ids, mask, positions, cache), strict=True))
    before.prepare(base, given)
    forward = given[FORWARD]
    if forward.observer is not None:
        raise UnsupportedModeError("observe() cannot look into a compiled model. Observe the model itself.")
    if given["position_ids"] is None:
        return torch.full_like(ids, forward.rows.past, dtype=torch.int64)
    return given["position_ids"].clone()


def _patched_base(state: PatchState | None, cache: LongCtxCache) -> nn.Module:
    """The base model that has this patch. A copied or unpickled one is known by the caches made for it.

    Raises:
        UnsupportedModeError: the patch was taken away, or the model is not known.
    """
    for known in (state and state.base, cache.model):
        base = known() if known else None
        if base is not None and vars(base).get("longctx_state") is state:
            return base
    raise UnsupportedModeError(
        "a compiled model was copied, loaded or unpatched since, and cannot tell which model it belongs to. Run one "
        "forward of the model itself first, such as the prompt's."
    )


@begin.register_fake
def _(handle: Tensor, patch: Tensor, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
    return torch.empty_like(ids, dtype=torch.int64) if positions is None else torch.empty_like(positions)


@torch.library.custom_op("hf_longctx::decode_layer", mutates_args={"handle"}, tags=TAGS)
def decode_layer(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, layer: int, scale: float) -> Tensor:
    """Attention ``[B, 1, H, D]`` of q ``[B, H, 1, D]``, after k, v ``[B, H_kv, 1, D]`` were cached."""
    cache = cache_of(handle)
    kv, _ = cache.update(k, v, layer)
    return attend_cached(cache.layers[layer].plan, q, kv, Scores(scale))


@decode_layer.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, layer: int, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
