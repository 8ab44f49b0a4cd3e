"""What a model whose tokens are evicted by score refuses: before a layer writes, each cause in words of its own."""

from __future__ import annotations

import pytest
import torch
from helpers.evicting import BY, evicting, read, some
from helpers.tiny import tiny_model
from transformers import DynamicCache, GenerationConfig

from hf_longctx import CacheError, ConfigError, LongCtxCache, UnsupportedModeError, observe

SNAPKV = {"rule": {"score": "snapkv", "window": 8}, "budget": {"share": 0.3}}


@pytest.fixture
def model():
    return evicting(**SNAPKV)


def refused(model, match: str, call, error=UnsupportedModeError) -> None:
    """Raises, and the model gives the tokens that it gave before."""
    ids = some(1, 60)
    want = model.generate(ids, max_new_tokens=4)
    with pytest.raises(error, match=match):
        call(ids)
    model.eval()
    assert torch.equal(model.generate(ids, max_new_tokens=4), want)


def test_observing(model):
    def forward(ids, **kwargs):
        with observe(model, lambda *call: None):
            model(ids, **kwargs)

    def generate(ids):
        with observe(model, lambda *call: None):
            model.generate(ids, max_new_tokens=3)

    match = r"stores.retrieval \(evicted\) chooses by the data .* observe\(\) shows the keys of all tokens"
    for call in (forward, generate, lambda ids: forward(ids, past_key_values=LongCtxCache(model))):
        refused(model, match, call)


def test_training(model):
    match = "in training mode there is no cache: every token would be read"
    refused(model, match, lambda ids: model.train()(ids))
    refused(model, match, lambda ids: model.train()(ids, labels=ids))


def test_gradients_through_what_was_cached(model):
    cache = LongCtxCache(model)
    read(model, some(60), cache)
    with pytest.raises(UnsupportedModeError, match="gradients do not flow through the tokens a LongCtxCache kept"):
        model(some(1, 2), past_key_values=cache).logits.sum().backward()


def test_caches_of_transformers(model):
    match = "this forward got a DynamicCache, from which none would leave"
    for call in (
        lambda ids, cache: model(ids, past_key_values=cache),
        lambda ids, cache: model.generate(ids, max_new_tokens=3, past_key_values=cache),
    ):
        cache = DynamicCache(config=model.config)
        refused(model, match, lambda ids, call=call, cache=cache: call(ids, cache))
        assert cache.get_seq_length() == 0
    offloaded = {"max_new_tokens": 3, "cache_implementation": "offloaded"}
    refused(model, "from which none would leave", lambda ids: model.generate(ids, **offloaded))


def test_generating_without_a_cache(model):
    match = r"use_cache=False .*stores.retrieval \(evicted\) chooses which cached tokens stay"
    refused(model, match, lambda ids: model.generate(ids, max_new_tokens=3, use_cache=False))
    config = GenerationConfig(max_new_tokens=3, use_cache=False)
    refused(model, match, lambda ids: model.generate(ids, generation_config=config))
    cache = LongCtxCache(model)
    refused(model, match, lambda ids: model.generate(ids, max_new_tokens=3, use_cache=False, past_key_values=cache))
    assert cache.seen == 0
    logits = model(some(1, 20), use_cache=False).logits
    assert torch.equal(logits, model(some(1, 20)).logits), "a prompt alone is read whole"


def test_drafts_where_tokens_leave_while_decoding():
    model = evicting(**SNAPKV, every=16)
    helper = tiny_model("llama", torch.float64, layers=1)
    match = "assisted decoding and prompt lookup with stores.retrieval.every = 16: rejected drafts are rolled back"
    refused(model, match, lambda ids: model.generate(ids, max_new_tokens=3, assistant_model=helper))
    refused(model, match, lambda ids: model.generate(ids, max_new_tokens=3, prompt_lookup_num_tokens=3))
    helper = evicting(**SNAPKV, every=16, model=helper)
    other = tiny_model("llama", torch.float64)
    with pytest.raises(UnsupportedModeError, match=match):
        other.generate(some(1, 60), max_new_tokens=3, assistant_model=helper)


@pytest.mark.parametrize("by", BY)
def test_taking_back_what_was_evicted(by):
    model = evicting(**SNAPKV, by=by)
    cache = read(model, some(60))
    read(model, some(4), cache, chunk=1)
    before = cache.nbytes, cache.seen
    with pytest.raises(CacheError, match="cannot crop from 64 to 59 tokens: tokens were evicted after 60"):
        cache.crop(59)
    assert (cache.nbytes, cache.seen) == before
    read(model, some(1), cache.fork())
    assert cache.oldest_crop == 60
    cache.crop(60)
    assert cache.seen == 60
    cache.crop(-60)
    assert (cache.seen, cache.nbytes) == (0, 0)


def test_taking_back_queries_that_a_score_has_taken_in():
    model = evicting(rule={"score": "observed", "mean": True}, budget={"share": 0.5})
    cache = read(model, some(600))
    with pytest.raises(CacheError, match="the score of its eviction has taken in the queries of 345 tokens"):
        cache.crop(300)
    cache.crop(400)
    model(some(1, 10), past_key_values=cache)
    assert cache.seen == 410


def test_a_cache_that_was_filled_by_hand(model):
    cache = LongCtxCache(model)
    k = torch.randn(1, 4, 60, 8, dtype=torch.float64)
    for layer in range(3):
        cache.update(k, k, layer)
    for _ in range(2):  # it stays so
        with pytest.raises(CacheError, match="score 'snapkv' of the retrieval heads asks for queries of the prompt"):
            model(some(1, 1), past_key_values=cache)
        assert cache.seen == 60 and cache.own[0].whole


@pytest.mark.parametrize("score", ["snapkv", "ems"])
def test_asking_again_for_queries_that_are_gone(score):
    model = evicting(rule={"score": score, "window": 8}, budget={"share": 0.3})
    cache = read(model, some(60))
    read(model, some(3), cache, chunk=1)
    before = cache.nbytes
    with pytest.raises(CacheError, match=f"score '{score}' of the retrieval heads asks for queries of the prompt"):
        cache.compress(budget={"share": 0.1})
    assert cache.nbytes == before and cache.own[0].whole


def test_an_eviction_that_was_interrupted(model, monkeypatch):
    cache = read(model, some(60))
    store = cache.own[1].evicting[0]

    def interrupted(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "scored", interrupted)
        model(some(1, 1), past_key_values=cache)
    with pytest.raises(CacheError, match="was interrupted while it was written"):
        model(some(1, 1), past_key_values=cache)
    cache.reset()
    assert read(model, some(60), cache).seen == 60


def test_a_selection_that_learns_from_the_prompt_is_refused_where_its_keys_leave():
    more = {"decode": {"retrieval": {"select": "prefix_clusters"}}}
    with pytest.raises(UnsupportedModeError, match="learns from a prompt's queries which keys belong together"):
        evicting(**SNAPKV, by="uniform", top=more)
    evicting(**SNAPKV, by="uniform", top={"decode": {"retrieval": {"select": "clusters"}}})


@pytest.mark.parametrize("store", ["thin", "paired", "evicted"])
def test_what_is_left_is_kept_by_a_store_that_keeps_it(store):
    with pytest.raises(ConfigError, match=rf"stores.retrieval.keep: got store '{store}'.*full, quantized, offloaded"):
        evicting(**SNAPKV, by="uniform", keep={"store": store})
    evicting(**SNAPKV, by="uniform", keep={"store": "offloaded"})
