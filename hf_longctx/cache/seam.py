"""The two things that differ between versions of Transformers in a way that a patched model must know.

Before 5.24 the cache is called ``past_key_values``, since then ``cache``. Gradient checkpointing takes the cache from
the layers, in some versions only where gradients are enabled. Both are looked up here, and nothing asks for a version.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import transformers
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..errors import UnsupportedModeError

NAMES = ("cache", "past_key_values")
CACHE = next(name for name in NAMES if name in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)})
OTHER = next(name for name in NAMES if name != CACHE)


def cache_of(output: Any) -> Any:
    """The cache in what a model's forward or ``generate(return_dict_in_generate=True)`` returned, or None."""
    return getattr(output, CACHE, None)


def rename_cache(given: dict[str, Any]) -> None:
    """Keyword arguments in place: a cache under the name that this Transformers does not use goes to the one it does.

    Raises:
        UnsupportedModeError: two caches were given, one under each name.
    """
    if OTHER not in given:
        return
    other = given.pop(OTHER)
    if other is None:
        return
    if given.get(CACHE) not in (None, other):
        raise UnsupportedModeError(
            f"two caches were given, one as {CACHE} and another as {OTHER}, which are two names of one argument. "
            f"Give one of them, as {CACHE}."
        )
    given[CACHE] = other


@functools.cache
def checkpointing_drops_cache(gradients: bool) -> bool:
    """Whether a layer under gradient checkpointing, in training mode, is run without the cache it was given.

    Args:
        gradients: with gradients enabled; some versions of Transformers keep the cache where they are not.
    """

    class Layer(GradientCheckpointingLayer):
        gradient_checkpointing = True

        def forward(self, hidden: Any, **kwargs: Any) -> Any:
            return kwargs[CACHE]

    layer = Layer().train()
    layer._gradient_checkpointing_func = lambda forward, *args: forward(*args)
    cache = object()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # this is a question, not the caller's mistake
    try:
        with torch.set_grad_enabled(gradients):
            return layer(None, **{CACHE: cache}) is not cache
    finally:
        transformers.logging.set_verbosity(level)
