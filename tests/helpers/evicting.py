"""Tiny models whose heads evict tokens by score, and what a cache of theirs knows."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers.tiny import config_for, tiny_model
from hf_longctx import LongCtxCache, patch_model
from hf_longctx.cache.seam import CACHE
from hf_longctx.layout.rows import Rows

BY = ("uniform", "head", "layer", "model")


def evicting(family: str = "llama", roles="retrieval", model=None, top=None, **store):
    """A patched model in float64; ``store``: fields of ``store: evicted``; ``top``: other sections of the config."""
    model = model or tiny_model(family, torch.float64)
    fields = {"store": "evicted", "recent": 8, "sink": 4, **store}
    return patch_model(model, config_for(model, roles, stores={"retrieval": fields}, **(top or {})))


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model, ids: Tensor, cache: LongCtxCache | None = None, chunk: int | None = None) -> LongCtxCache:
    """The cache after reading ``ids [T]`` in pieces."""
    cache = LongCtxCache(model) if cache is None else cache
    for piece in ids.split(chunk or len(ids)):
        model(piece[None], **{CACHE: cache})
    return cache


def state_of_heads(cache: LongCtxCache, name: str) -> list[list[Tensor]]:
    """What is known of each token, by layer and KV head: ``[S]``."""
    found = []
    for layer in cache.own:
        (store,) = layer.evicting
        parts = [(key[1], one.state[name]) for key, one in sorted(store.known.parts.items(), key=lambda item: item[0])]
        found.append([head for _, part in parts for head in part[0]])
    return found


def keys_of_heads(cache: LongCtxCache) -> list[list[Tensor]]:
    """The cached keys by layer and KV head, ``[S, D]``, of one sequence."""
    found = []
    for layer in cache.own:
        (store,) = layer.evicting
        part = store.held(Rows(1, 0, cache.seen, cache.starts))
        heads = range(len(store.heads.kv_heads))
        if store.ragged is None:
            k = part.tokens(slice(None), 0, -1)[0]
            found.append([k[0, head] for head in heads])
        else:
            found.append([part.tokens(slice(None), 0, head)[0][0, 0] for head in heads])
    return found


@torch.no_grad()
def logits_after(model, cache: LongCtxCache, ids: Tensor) -> Tensor:
    """Logits ``[T, V]`` of ``ids [T]`` read after a fork of the cache, a token at a time."""
    other = cache.fork()
    return torch.cat([model(one[None, None], **{CACHE: other}).logits[0] for one in ids])
