"""Caches and patches by number, for compiled code, which can hand on tensors and no objects."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CacheError

if TYPE_CHECKING:
    from .cache import LongCtxCache

_numbers = itertools.count(1)
_held: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def new_handle(held: Any) -> Tensor:
    """A number for this object, int64 ``[1]`` on the CPU. A plain number would be a constant of the compiled code."""
    number = next(_numbers)
    _held[number] = held
    with torch.inference_mode(False):
        return torch.tensor([number])


def held_by(handle: Tensor) -> Any:
    """The object of a handle; None where it is gone."""
    return _held.get(int(handle))


def cache_of(handle: Tensor) -> LongCtxCache:
    """The cache of a handle.

    Raises:
        CacheError: it is gone.
    """
    cache = held_by(handle)
    if cache is None:
        raise CacheError("a compiled model was given a cache that is gone. Hold the cache for as long as it is used.")
    return cache
