"""``bench memory --check``: the KV caches that were calculated, allocated for real and counted."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from ..cache.bytes import storage_bytes
from ..cache.cache import LongCtxCache, cache_bytes
from ..cache.stock_layers import changed
from ..decode.base import Index
from ..errors import LongCtxError
from ..layout.gather import shape_of
from ..layout.segments import HeadKV
from ..planning.memory import DENSE, RESERVED, MemoryModel
from ..planning.sizes import dtype_of
from .environment import free_memory

MARGIN = 0.05  # of the free memory, left to everybody else


@torch.no_grad()
def check(memory_model: MemoryModel, way: str, tokens: int) -> int:
    """Bytes really allocated by a cache that was filled layer by layer with ``tokens`` tokens in each row.

    Raises:
        LongCtxError: the machine has less memory free than that, or they are not the bytes that were calculated.
    """
    wanted = memory_model.kv(way, tokens)
    free = free_memory()
    held = wanted + (0 if way == DENSE else memory_model.host(tokens))
    if free is not None and held > (1 - MARGIN) * free:
        raise LongCtxError(
            f"--check: the {way} cache of {tokens} tokens takes {held / 1e9:.2f} GB, this machine has "
            f"{free / 1e9:.2f} GB free. Check a shorter context with --check-tokens, or on a larger machine."
        )
    counted = fill(memory_model, way, tokens)
    if counted != wanted:
        raise LongCtxError(
            f"the {way} cache of {tokens} tokens was calculated as {wanted} bytes and takes {counted}: the table is "
            "wrong. Please report this with your versions."
        )
    return counted


def fill(memory_model: MemoryModel, way: str, tokens: int) -> int:
    """Most bytes that the layers of a new cache hold while they are filled with zeros, but for pages in host memory."""
    if way == DENSE:
        cache: Cache = DynamicCache(config=memory_model.text)
    else:
        own = way == RESERVED
        cache = LongCtxCache(memory_model.patch(), tokens if own else None, rollback=own)
    windows = {plan.layer_idx: plan.window if way == DENSE else None for plan in memory_model.plans}
    most = 0
    indexes: list[Index] = []
    for index, window in sorted({**windows, **memory_model.stock_windows}.items()):
        step = tokens if window is None else memory_model.chunk(tokens)
        before = cache_bytes(cache)
        largest = 0
        for past in range(0, tokens, step):
            kept, _ = cache.update(*_zeros(memory_model, memory_model.kv_heads, min(step, tokens - past)), index)
            largest = max(largest, cache_bytes(cache) - before)
        most += largest
        indexes += [] if way == DENSE or window is not None else _indexes(kept.parts, tokens)
    before = cache_bytes(cache)
    for index, states in memory_model.activations.states.items():
        cache.layers[index] = changed(states, lambda _, tensor: torch.zeros_like(tensor, device="cpu"))
    most += cache_bytes(cache) - before
    most += sum(storage_bytes(one.tensors()) for one in indexes)
    return most if way == DENSE else most - cache.nbytes_offloaded.get("in host memory", 0)


def _indexes(parts: list[HeadKV], tokens: int) -> list[Index]:
    """What the selections of a layer keep beside their stores once the last token was decoded."""
    made = []
    for part in parts:
        if part.selection is not None and part.selection.spec.runs(tokens):
            spec = part.selection.spec
            index = spec.new_index()
            index.max_tokens = part.selection.max_tokens
            cached = part.alone(slice(None), 0)
            if spec.queries:  # of the prompt before that token
                batch, heads, _, dim = shape_of(cached)
                index.saw(torch.zeros(1, dtype=part.dtype).expand(batch, heads, tokens - 1, dim), 0, 1.0)
                spec.settle([index], [cached])
            else:
                index.extend(cached, spec.between(tokens - 1)[1] * spec.size)
            made.append(index)
    return made


def _zeros(memory_model: MemoryModel, heads: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, H_kv, T, D]`` of a layer, behind which there is one number each."""
    shape = (memory_model.settings.batch, heads, tokens, memory_model.head_dim)
    return tuple(torch.zeros(1, dtype=dtype_of(memory_model.settings.dtype)).expand(shape) for _ in "kv")
