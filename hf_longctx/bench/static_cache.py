"""Transformers' ``StaticCache`` as a column: a fixed capacity, so no copy of the cache per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import StaticCache

from .columns import Column, make_model
from .settings import Settings


@dataclass
class StaticColumn(Column):
    """Stock Transformers with a cache of ``capacity`` tokens.

    Its buffers are handed to attention whole, so one decoded token needs a mask of what is filled. Only to decode with:
    ``attend`` takes one query.
    """

    capacity: int = 0
    seen: int = 0

    @classmethod
    def of_capacity(cls, settings: Settings, dtype: torch.dtype, capacity: int) -> StaticColumn:
        """Empty buffers for so many tokens."""
        model = make_model(settings, dtype, "meta")
        return cls(model, new_cache(model, capacity), capacity=capacity)

    def forget(self) -> None:
        """Go on with an empty cache."""
        self.cache = new_cache(self.model, self.capacity)
        self.seen = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer == 0:  # a model makes one mask per forward, for all layers
            self.seen += k.shape[2]
            self.mask = (torch.arange(self.capacity) < self.seen)[None, None, None]
        return super().update(layer, k, v)


def new_cache(model: object, capacity: int) -> StaticCache:
    """An empty cache of ``capacity`` tokens, whose buffers are allocated by the first update."""
    return StaticCache(config=model.config, max_cache_len=capacity)


def refusal(work: Callable[[], object]) -> str | None:
    """Why ``work``, which calls code that may not fit this Transformers, does not run; None where it does."""
    try:
        work()
    except (
        AssertionError,
        AttributeError,
        ImportError,
        IndexError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None
