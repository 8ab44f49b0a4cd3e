"""observe: show every attention call of a patched model to a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import UnsupportedModelError
from .hooks import observers
from .modules import language_model, state_of


@contextmanager
def observe(model: nn.Module, fn: Callable) -> Iterator[nn.Module]:
    """Show every attention call of a patched model to ``fn``, on this thread, until the block ends.

    ``fn(layer_idx, q, k, v, scaling, rows, compute)`` gets the rotated q ``[B, H, T, D]`` and all keys and values
    ``[B, H_kv, S, D]``. It returns the layer's output ``[B, H, T, D]``, built from ``compute("retrieval")`` and
    ``compute("streaming")`` (every head computed by the rule of that role's store, as decoded tokens are: no prefill
    pattern and no dense tail; differentiable), or None to leave it alone; ``compute.scores`` has softcap and sinks
    where the model has some. Inside, the model makes a DynamicCache for itself, which keeps every token. Where it is
    given a ``LongCtxCache``, k and v are the same tuple, one `hf_longctx.model.observed.CachedRole` per role with
    heads: ``sequence(i)`` gives the keys and values that are cached and their row positions, ``dropped(i)`` the number
    of tokens that are gone, and ``compute(role)`` is refused in layers that have heads of the other role.

    Raises:
        UnsupportedModelError: the model is not patched.
    """
    if state_of(model) is None:
        raise UnsupportedModelError("observe needs a patched model: call patch_model(model) first.")
    token = observers.set({**observers.get(), id(language_model(model)): fn})
    try:
        yield model
    finally:
        observers.reset(token)
