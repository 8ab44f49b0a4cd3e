"""What Transformers' caches have because a layer is two tensors, and ours has not: each says what to use instead.

A ``LongCtxLayer`` keeps other tokens for every head, so there are no keys ``[B, H_kv, S, D]`` to read, prune or move.
"""

from __future__ import annotations

from typing import Any, NoReturn

from ..errors import UnsupportedModeError


def _refuse(asked: str, instead: str) -> NoReturn:
    raise UnsupportedModeError(f"{asked}: {instead}")


def _tensors(name: str) -> property:
    """``layer.keys`` or ``layer.values``, to be read or replaced."""

    def refuse(layer: Any, *value: Any) -> NoReturn:
        _refuse(
            f"layers[{layer.plan.layer_idx}].{name} of a LongCtxCache",
            "its heads keep different numbers of tokens, so there is no such tensor. What reads or prunes the keys of "
            "a cache (the presses of kvpress do) needs the model without its patch: unpatch_model(model). To look at "
            "keys use hf_longctx.observe().",
        )

    return property(refuse, refuse)


def _of_the_cache(name: str):
    """A method that would change one layer and leave the rest of the cache as it was."""

    def refuse(layer: Any, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(
            f"layers[{layer.plan.layer_idx}].{name}()",
            f"the layers of a LongCtxCache change together, with what it knows of its rows. Call cache.{name}().",
        )

    refuse.__name__ = name
    return refuse


def _moving(name: str):
    """Moving a layer's tensors between device and host memory."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(
            f"{name}() of a LongCtxCache",
            "it is not moved layer by layer. The config says where old tokens live: "
            "stores={'retrieval': {'store': 'offloaded'}}.",
        )

    refuse.__name__ = name
    return refuse


class DenseLayerMembers:
    """Of a layer."""

    keys = _tensors("keys")
    values = _tensors("values")
    offload = _moving("offload")
    prefetch = _moving("prefetch")
    crop = _of_the_cache("crop")
    reorder_cache = _of_the_cache("reorder_cache")
    batch_repeat_interleave = _of_the_cache("batch_repeat_interleave")
    batch_select_indices = _of_the_cache("batch_select_indices")


class DenseCacheMembers:
    """Of the whole cache."""

    offload = _moving("offload")
    prefetch = _moving("prefetch")

    def __iter__(self) -> NoReturn:
        _refuse("a LongCtxCache is not a sequence of keys and values", "its layers are cache.layers, without tensors.")

    def __getitem__(self, index: Any) -> NoReturn:
        iter(self)

    def early_initialization(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(
            "early_initialization() of a LongCtxCache",
            "rows, dtype and device are those of the first forward. To reserve memory make it with max_tokens=.",
        )
