"""``read``, by which texts are read on top of a context that is read once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..cache.seam import CACHE, cache_of
from ..model.modules import language_model
from ..model.observe import observe


def read(model: nn.Module, ids: Tensor, cache: Any = None, look: Callable | None = None) -> Any:
    """The cache after reading ``ids`` ``[1, T]`` on top of what ``cache`` holds, which stays as it is.

    Args:
        model: patched.
        cache: what this function gave for the text before, or None.
        look: an observer of the layers.
    """
    with observe(model, look or (lambda *call: None)):
        return cache_of(language_model(model)(ids, **{CACHE: copy.deepcopy(cache)}, use_cache=True))
