"""What the tests of both stores of pages share: models that use them, and their stores."""

from __future__ import annotations

import torch

from helpers.tiny import config_for, tiny_model
from hf_longctx import patch_model
from hf_longctx.config.words import load, words
from hf_longctx.stores._paged import Paged

WORDS = tuple(word for word in words("stores") if issubclass(load("stores", word), Paged))


def paged_config(model, word, page=16, recent=20, roles="mixed", window=(4, 16), **top):
    """A tiny model's config whose retrieval heads keep pages of ``page`` tokens and ``recent`` others."""
    fields = top.pop("fields", {})
    stores = {
        "retrieval": {"store": word, "page": page, "recent": recent, **fields},
        "streaming": {"store": "sink_recent", "sink": window[0], "recent": window[1]},
    }
    return config_for(model, roles, stores=stores, **top)


def paged_model(word, roles="retrieval", family="llama", dtype=torch.float64, layers=2, **config):
    torch.manual_seed(1)  # the same weights whatever the word
    model = tiny_model(family, dtype, layers=layers)
    return patch_model(model, paged_config(model, word, roles=roles, **config))


def full_model(roles="retrieval", family="llama", dtype=torch.float64, layers=2, **config):
    """The same model with ``store: full``."""
    torch.manual_seed(1)
    model = tiny_model(family, dtype, layers=layers)
    return patch_model(model, config_for(model, roles, **config))


def read(model, cache, ids, mask=None) -> torch.Tensor:
    """Feed new tokens; the logits of the last one."""
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]


def paged_stores(cache) -> list:
    return [store for layer in cache.layers for store in layer.stores if hasattr(store, "pages")]


def pages_of(cache) -> list:
    """The page objects of every store."""
    return [[entry.page for entry in store.pages.entries] if store.pages else [] for store in paged_stores(cache)]
