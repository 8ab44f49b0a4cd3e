"""``bench memory --check``: the KV caches that were calculated, allocated for real and counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from ..cache.bytes import storage_bytes
from ..cache.cache import LongCtxCache, cache_bytes
from ..cache.stock_layers import changed
from ..decode.base import Index
from ..errors import LongCtxError
from ..layout.forward import Forward
from ..layout.gather import shape_of
from ..layout.rotation import Rotation
from ..layout.rows import Rows
from ..layout.scores import Scores
from ..layout.segments import HeadKV
from ..planning.memory import DENSE, RESERVED, MemoryModel
from ..planning.sizes import dtype_of
from .environment import free_memory

MARGIN = 0.05  # of the free memory, left to everybody else


class Filled(NamedTuple):
    """Bytes that a cache held: most, and once the prompt had ended; None: that takes more than keys and queries."""

    most: int
    left: int | None


@torch.no_grad()
def check(memory_model: MemoryModel, way: str, tokens: int) -> Filled:
    """Bytes really allocated by a cache that was filled layer by layer with ``tokens`` tokens in each row.

    Raises:
        LongCtxError: the machine has less memory free than that, or they are not the bytes that were calculated.
    """
    wanted = Filled(memory_model.kv(way, tokens), memory_model.kv_left(way, tokens))
    free = free_memory()
    held = wanted.most + (0 if way == DENSE else memory_model.host(tokens))
    if free is not None and held > (1 - MARGIN) * free:
        raise LongCtxError(
            f"--check: the {way} cache of {tokens} tokens takes {held / 1e9:.2f} GB, this machine has "
            f"{free / 1e9:.2f} GB free. Check a shorter context with --check-tokens, or on a larger machine."
        )
    counted = fill(memory_model, way, tokens)
    for moment, found, said in zip(("", " once the prompt has ended"), counted, wanted, strict=True):
        if found is not None and (found > said or (found < said and memory_model.exact)):
            raise LongCtxError(
                f"the {way} cache of {tokens} tokens was calculated as {said} bytes{moment} and takes {found}: the "
                "table is wrong. Please report this with your versions."
            )
    return counted


def fill(memory_model: MemoryModel, way: str, tokens: int) -> Filled:
    """What the layers of a new cache hold that are filled with zeros, but for pages in host memory."""
    if way != DENSE and memory_model.evicts:
        return _fill_and_evict(memory_model, way, tokens)
    if way == DENSE:
        cache: Cache = DynamicCache(config=memory_model.text)
    else:
        cache = _new_cache(memory_model, way, tokens)
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
    most += _fill_others(memory_model, cache)
    most += sum(storage_bytes(one.tensors()) for one in indexes)
    most -= 0 if way == DENSE else cache.nbytes_offloaded.get("in host memory", 0)
    return Filled(most, most)


def _fill_others(memory_model: MemoryModel, cache: Cache) -> int:
    """Bytes of the states of layers without keys."""
    before = cache_bytes(cache)
    for index, states in memory_model.activations.states.items():
        cache.layers[index] = changed(states, lambda _, tensor: torch.zeros_like(tensor, device="cpu"))
    return cache_bytes(cache) - before


def _new_cache(memory_model: MemoryModel, way: str, tokens: int) -> LongCtxCache:
    own = way == RESERVED
    return LongCtxCache(memory_model.patch(), tokens if own else None, rollback=own)


def _fill_and_evict(memory_model: MemoryModel, way: str, tokens: int) -> Filled:
    """As `fill`, all layers together, as a prompt is read: in chunks where tokens are evicted between them."""
    cache = _new_cache(memory_model, way, tokens)
    _fill_others(memory_model, cache)
    chunked = bool(memory_model.stock_windows) or cache.regular
    step = memory_model.chunk(tokens) if chunked else tokens
    most = 0
    for past in range(0, tokens, step):
        _read(memory_model, cache, past, min(step, tokens - past), prompt=True)
        most = max(most, _held(cache))
    if any(rule.moment == "call" or rule.surprises for rule in memory_model.rules):
        return Filled(most, None)
    cache.evict()
    indexes = list(_indexes_left(memory_model, cache, tokens))
    if way != RESERVED:  # it has no room for another token
        _read(memory_model, cache, tokens, 1, prompt=False)
    left = _held(cache) + sum(storage_bytes(one.tensors()) for one in indexes)
    return Filled(max(most, left), left)


def _indexes_left(memory_model: MemoryModel, cache: LongCtxCache, tokens: int) -> Iterator[Index]:
    """The indexes of selections over what is left."""
    rows = Rows(memory_model.settings.batch, 0, tokens)
    for layer in cache.own:
        for store, selection in zip(layer.stores, layer.selections, strict=True):
            if selection is not None:
                part = store.held(rows)
                part.selection = selection
                yield from _indexes([part], shape_of(part.alone(slice(None), 0))[2])


def _held(cache: LongCtxCache) -> int:
    return cache.nbytes - cache.nbytes_offloaded.get("in host memory", 0)


def _read(memory_model: MemoryModel, cache: LongCtxCache, past: int, new: int, prompt: bool) -> None:
    """A forward of zeros, of which stores that ask for queries are shown the last ones."""
    rows = Rows(memory_model.settings.batch, past, new)
    cache.begin(Forward(rows, prompt=prompt))
    for index in sorted({plan.layer_idx for plan in memory_model.plans} | set(memory_model.stock_windows)):
        kept, _ = cache.update(*_zeros(memory_model, memory_model.kv_heads, new), index)
        for part in getattr(kept, "parts", ()):
            if part.attended is not None:
                store = part.attended.__self__
                if (known := getattr(store, "known", None)) is not None:  # without weights no rotation was found
                    known.rotation = known.rotation or Rotation((1.0,) * (memory_model.head_dim // 2))
                heads = len(part.heads.kv_heads) * memory_model.group
                count = min(new, store.spec.queries + store.slack + 1)
                q = torch.zeros(rows.batch, heads, count, memory_model.head_dim, dtype=part.dtype)
                part.attended(q, part, rows, Scores(1.0))


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
