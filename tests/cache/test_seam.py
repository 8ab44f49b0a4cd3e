"""The cache under both of its names, and what is asked of a Transformers when a model is patched."""

from __future__ import annotations

import inspect
import logging
import pickle

import pytest
import torch
from helpers.tiny import config_for, tiny_model
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from hf_longctx import LongCtxCache, UnsupportedModeError, UnsupportedModelError, patch_model, patched, unpatch_model
from hf_longctx.cache.layer import LongCtxLayer
from hf_longctx.cache.seam import CACHE, NAMES, OTHER, cache_of, rename_cache
from hf_longctx.model import contract

pytestmark = pytest.mark.quick

IDS = torch.arange(3, 43)[None]


@pytest.fixture
def model():
    model = tiny_model()
    return patch_model(model, config_for(model))


CALLS = {
    "model": lambda model, given: cache_of(model(IDS, **given)),
    "base": lambda model, given: cache_of(model.base_model(IDS, **given)),
    "generate": lambda model, given: cache_of(
        model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True, **given)
    ),
}


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_taken_under_both_names(model, name, call):
    with torch.no_grad():
        cache = LongCtxCache(model)
        assert CALLS[call](model, {name: cache}) is cache
        assert cache.seen == IDS.shape[1] + (2 if call == "generate" else 0)
        dense = DynamicCache(config=model.config)
        assert CALLS[call](model, {name: dense}) is dense
        assert CALLS[call](model, {name: None}).__class__ is LongCtxCache


@pytest.mark.parametrize("call", [CALLS["base"], CALLS["generate"]])
def test_two_caches_under_two_names_are_refused(model, call):
    caches = {name: LongCtxCache(model) for name in NAMES}
    with pytest.raises(UnsupportedModeError, match=f"as {CACHE} and another as {OTHER}"):
        call(model, caches)
    assert not any(cache.seen for cache in caches.values())
    same = dict.fromkeys(NAMES, caches[CACHE])
    with torch.no_grad():
        assert call(model, same) is caches[CACHE]


def test_renaming_touches_nothing_else():
    given = {"a": 1, OTHER: None}
    rename_cache(given)
    assert given == {"a": 1}
    rename_cache(given)
    assert given == {"a": 1}


def test_generate_is_the_classes_own_to_a_reader(model):
    plain = inspect.signature(unpatch_model(pickle.loads(pickle.dumps(model))).generate)
    assert inspect.signature(model.generate) == plain
    assert model.generate.__name__ == "generate" and "patched LlamaForCausalLM" in repr(model.generate)
    unpatch_model(model)
    assert not {"generate", "init_continuous_batching", "_prepare_cache_for_generation"} & set(vars(model))


def test_what_others_put_over_generate_stays(model):
    def theirs(*args, **kwargs):
        return "theirs"

    model.generate = theirs
    assert unpatch_model(model).generate is theirs
    patch_model(model, config_for(model))
    assert model.generate() == "theirs"
    with patched(model, config_for(model, "retrieval")):
        assert model.generate() == "theirs"
    assert unpatch_model(model).generate is theirs


def test_a_newer_version_is_named_once(monkeypatch, caplog):
    monkeypatch.setattr(contract.transformers, "__version__", "5.99.0")
    contract._warn_untested.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            patch_model(unpatched := tiny_model(), config_for(unpatched))
    said = [record.getMessage() for record in caplog.records if "5.99.0" in record.getMessage()]
    assert len(said) == 1
    assert "newer" in said[0]
    assert contract.NEWEST in said[0]


@pytest.mark.parametrize("version", ["5.0.0", "5.23.1", "5.24.0", "5.24.3.dev0"])
def test_a_tested_version_is_not_named(version, monkeypatch, caplog):
    monkeypatch.setattr(contract.transformers, "__version__", version)
    contract._warn_untested.cache_clear()
    model = tiny_model()
    patch_model(model, config_for(model))
    assert not [record for record in caplog.records if "newer" in record.getMessage()]


def without_cache(self, hidden_states, **kwargs):
    raise AssertionError("never runs")


BREAKS = {
    "the forward of LlamaModel takes no": lambda model: (type(model.base_model), "forward", without_cache),
    "the forward of LlamaAttention takes no": lambda model: (
        type(model.base_model.layers[0].self_attn),
        "forward",
        without_cache,
    ),
    "_prepare_cache_for_generation takes generation_config, other": lambda model: (
        type(model),
        "_prepare_cache_for_generation",
        lambda self, generation_config, other: None,
    ),
    "a cache layer must have turn": lambda model: (LongCtxLayer, "__abstractmethods__", frozenset({"turn"})),
}


@pytest.mark.parametrize("said", BREAKS)
def test_a_version_that_does_not_fit_is_refused_in_a_sentence(said, monkeypatch):
    model = tiny_model()
    config = config_for(model)
    with monkeypatch.context() as changed:
        changed.setattr(*BREAKS[said](model))
        with pytest.raises(UnsupportedModelError, match=said):
            patch_model(model, config)
    assert not hasattr(model.base_model, "longctx_state")
    patch_model(model, config)


def test_our_layer_has_every_method_that_transformers_asks_for():
    assert not LongCtxLayer.__abstractmethods__
    assert CacheLayerMixin.__abstractmethods__, "a control"
