"""Small settings of every decode selection, and models that run them, for the tests that run over all of them."""

from __future__ import annotations

import dataclasses

import torch

from helpers.cases import cases
from helpers.store_cases import BY_DATA, role_of
from helpers.store_cases import CASES as STORES
from helpers.tiny import config_for, tiny_model
from hf_longctx import LongCtxCache, patch_model
from hf_longctx.config.words import load

SMALL = {"sink": 4, "recent": 9, "min_tokens": 0, "dense_layers": 0}
EVERYTHING = {"budget": 1 << 20, "share": None, "mass": None, "quantile": 0.0, "coarse": None}
WORDS = {name: word for name, (word, _) in cases("decode").items()}
CASES = {name: fields for name, (_, fields) in cases("decode").items()}
SELECTING = [name for name, word in WORDS.items() if not load("decode", word).reads_all]
FIRST = [next(name for name in SELECTING if WORDS[name] == word) for word in dict.fromkeys(map(WORDS.get, SELECTING))]
RETRIEVAL = [name for name in STORES if role_of(name) == "retrieval" and name not in BY_DATA]


def spec_of(case: str, **fields):
    """The spec of a case over few tokens, with these fields where its class has them."""
    cls = load("decode", WORDS[case])
    known = {f.name for f in dataclasses.fields(cls)}
    given = {name: value for name, value in {**SMALL, **CASES[case], **fields}.items() if name in known}
    return cls(**given)


def selecting(spec, store="full", roles="mixed", family="llama", dtype=torch.float64, layers=2, **more):
    """A tiny model, always of the same weights, patched with a selection (None: it reads everything)."""
    torch.manual_seed(0)
    top = {name: more.pop(name) for name in ("kernel", "prefill") if name in more}
    model = tiny_model(family, dtype, layers=layers, **more)
    decode = {} if spec is None else {"decode": {"retrieval": spec}}
    return patch_model(model, config_for(model, roles, stores={"retrieval": STORES[store]}, **top, **decode))


def prompted(model, ids, mask=None, **kwargs) -> LongCtxCache:
    """A cache that has read ``ids`` at once."""
    cache = LongCtxCache(model, **kwargs)
    go_on(model, cache, ids, mask, ids.shape[1])
    return cache


def go_on(model, cache, ids, mask=None, step: int = 1) -> torch.Tensor:
    """Logits ``[B, T, V]`` of more tokens, ``step`` in a forward; ``mask``: of all tokens with them."""
    outs = []
    past = cache.seen
    for low in range(0, ids.shape[1], step):
        new = ids[:, low : low + step]
        seen = None if mask is None else mask[:, : past + low + new.shape[1]]
        with torch.no_grad():
            outs.append(model(new, attention_mask=seen, past_key_values=cache).logits)
    return torch.cat(outs, 1)


def selections(cache) -> list:
    """Every selection of a cache."""
    return [one for layer in cache.own for one in layer.chosen]


def index_memory(cache) -> dict[int, int]:
    """Bytes by place of the memory behind the indexes of a cache, choices apart."""
    parts = [part for one in selections(cache) for part in one.parts.values()]
    found = [x.untyped_storage() for part in parts for x in part.index.tensors()]
    return {storage.data_ptr(): storage.nbytes() for storage in found}
