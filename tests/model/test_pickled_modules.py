"""Which modules a pickle of a cache and of a patched model names: files that people have load as long as these stay."""

from __future__ import annotations

import io
import pickle

import torch
from helpers.caches import read
from helpers.tiny import config_for, tiny_model

from hf_longctx import LongCtxCache, patch_model

CONFIGS = {
    "defaults": {},
    "a prefill pattern": {"prefill": {"min_tokens": 0, "retrieval": {"pattern": "block_topk"}}},
    "quantized": {"stores": {"retrieval": {"store": "quantized", "group": 16, "residual": 0}}},
    "offloaded": {"stores": {"retrieval": {"store": "offloaded", "page": 16, "recent": 16}}},
    "offloaded_disk": {"stores": {"retrieval": {"store": "offloaded_disk", "page": 16, "recent": 16}}},
    "compensated": {"stores": {"streaming": {"store": "sink_recent_compensated", "sink": 4, "recent": {"min": 16}}}},
}
TOKENS = torch.arange(3, 83)[None]  # more than a window, a group and a few pages

# The one list. Pickles made by 0.1.0 and later name these modules of hf_longctx, so none of them may move.
NAMED = {
    "a patched model": (
        "cache.plan config.config config.model config.sections decode.dense layout.forward layout.heads "
        "model.compiled model.compiled_generate model.hooks model.private_config model.state "
        "prefill.block_topk prefill.dense prefill.sink_recent stores.full stores.offloaded "
        "stores.offloaded_disk stores.quantized stores.sink_recent stores.sink_recent_compensated"
    ),
    "a cache": (
        "cache.cache cache.layer cache.plan cache.token_ids decode.dense kernels._quantized layout.heads "
        "layout.segments prefill.block_topk stores._page stores._pages stores.full stores.offloaded "
        "stores.offloaded_disk stores.quantized stores.sink_recent stores.sink_recent_compensated"
    ),
}


def modules(data: bytes) -> set[str]:
    """The modules of hf_longctx that a pickle names, without that prefix."""
    found = set()

    class Names(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            found.add(module)
            return super().find_class(module, name)

    Names(io.BytesIO(data)).load()
    return {one.partition(".")[2] for one in found if one.split(".")[0] == "hf_longctx"}


def complaint(what: str, found: set[str], pinned: set[str]) -> str:
    """In a sentence how what a pickle names differs from what is pinned; nothing where it does not."""
    if found == pinned:
        return ""
    return (
        f"A pickle of {what} names {sorted(found - pinned)}, which nothing pins, and no longer "
        f"{sorted(pinned - found)}. Pickles that people have would not load: keep the old path importable, or break "
        "them on purpose and say so in CHANGELOG.md; then change the list of this file."
    )


def named() -> dict[str, set[str]]:
    """The modules that pickles of a model patched with each of CONFIGS, and of its filled cache, name together."""
    found: dict[str, set[str]] = {"a patched model": set(), "a cache": set()}
    for sections in CONFIGS.values():
        model = tiny_model("llama", head_dim=16)
        patch_model(model, config_for(model, **sections))
        cache = LongCtxCache(model)
        read(model, cache, TOKENS)
        found["a patched model"] |= modules(pickle.dumps(model))
        found["a cache"] |= modules(pickle.dumps(cache))
    return found


def test_a_pickle_names_the_modules_that_are_pinned():
    found = named()
    said = [complaint(what, found[what], set(pinned.split())) for what, pinned in NAMED.items()]
    assert not any(said), "\n".join(said)


def test_a_module_that_moves_is_said():
    found = modules(pickle.dumps(LongCtxCache))
    assert found == {"cache.cache"} and not complaint("a class", found, found)
    assert "names ['cache.cache'], which nothing pins, and no longer ['old.place']" in complaint(
        "a class", found, {"old.place"}
    )
