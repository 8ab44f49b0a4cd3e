"""Caches by number, for compiled code, which can hand on tensors and no objects."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CacheError

if TYPE_CHECKING:
    from .cache import LongCtxCache

_numbers = itertools.count(1)
_caches: weakref.WeakValueDictionary[int, LongCtxCache] = weakref.WeakValueDictionary()


def new_handle(cache: LongCtxCache) -> Tensor:
    """A number for this cache, int64 ``[1]`` on the CPU. A plain number would be a constant of the compiled code."""
    number = next(_numbers)
    _caches[number] = cache
    with torch.inference_mode(False):
        return torch.tensor([number])


def cache_of(handle: Tensor) -> LongCtxCache:
    """The cache of a handle.

    Raises:
        CacheError: it is gone.
    """
    cache = _caches.get(int(handle))
    if cache is None:
        raise CacheError("a compiled model was given a cache that is gone. Hold the cache for as long as it is used.")
    return cache
