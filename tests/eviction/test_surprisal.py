"""``score: surprisal``: likelihoods by the full logits of whole texts, however they were read, and turn by turn."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.every_family import Case
from helpers.every_family import tiny_model as random_model
from helpers.evicting import evicting, keys_of_heads, logits_after, read, some, state_of_heads
from helpers.tiny import FAMILIES, config_for, left_padded, tiny_model

from hf_longctx import (
    CacheError,
    ConfigError,
    LongCtxCache,
    PromptCache,
    UnsupportedModeError,
    UnsupportedModelError,
    patch_model,
    unpatch_model,
)

RULE = {"score": "surprisal"}


def surprised(model=None, family="llama", **store):
    return evicting(family, model=model, **{"rule": RULE, "by": "uniform", "budget": {"tokens": 40}, **store})


@torch.no_grad()
def by_definition(model, ids: torch.Tensor) -> torch.Tensor:
    """``-log p`` of each token ``[T]``; the first as the highest."""
    logs = model(ids[None], use_cache=False).logits[0].double().log_softmax(-1)
    found = -logs[:-1].gather(1, ids[1:, None])[:, 0]
    return torch.cat([found.max()[None], found])


def known(cache: LongCtxCache) -> list[torch.Tensor]:
    """What the heads of each layer know of their tokens: the same for all of them."""
    found = state_of_heads(cache, "surprisal")
    assert all(torch.equal(head, heads[0]) for heads in found for head in heads)
    return [heads[0].where(heads[0] >= 0, heads[0].max()) for heads in found]


@pytest.mark.spanning
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [None, 1, 7, 130])
def test_it_is_the_loss_of_every_token_however_the_prompt_is_cut(family, chunk):
    model = tiny_model(family, torch.float64)
    ids = some(400, seed=1)
    want = by_definition(model, ids)
    surprised(model, budget={"share": 1.0})
    cache = read(model, ids, chunk=chunk)
    cache.compress()
    for got in known(cache):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        assert not torch.allclose(got[1:], want[:-1], atol=1e-2), "a control"


@pytest.mark.parametrize("by", ["uniform", "layer"])
def test_the_highest_stay(by):
    model = tiny_model(dtype=torch.float64)
    ids = some(120, seed=1)
    scores = by_definition(model, ids)
    scores[:4] = scores[-8:] = float("inf")
    surprised(model, by=by)
    dense, cache = read(model, ids), read(model, ids)
    cache.evict()
    for whole, heads in zip(keys_of_heads(dense), keys_of_heads(cache), strict=True):
        bar = scores.sort(descending=True).values[len(heads[0]) - 1]
        assert all(torch.equal(kept, keys[scores >= bar]) for kept, keys in zip(heads, whole, strict=True))
    assert sum(len(heads[0]) for heads in keys_of_heads(cache)) == 3 * 40


def test_rows_with_pads_are_as_alone():
    model = surprised()
    ids, mask = left_padded([150, 90, 120])
    asked = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    together = torch.stack(model.generate(ids, attention_mask=mask, **asked).logits, 1)
    for row in range(3):
        own = ids[row, mask[row].bool()][None]
        alone = torch.stack(model.generate(own, **asked).logits, 1)[0]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-5)
        assert (together[row] - together[row - 1]).abs().max() > 1e-2, "a control"


def test_generate_gives_the_same_as_by_hand_and_the_budget_of_everything_is_dense():
    model = surprised()
    ids = some(1, 200)
    asked = {"max_new_tokens": 8, "do_sample": False}
    got = model.generate(ids, **asked)
    cache = read(model, ids[0])
    cache.evict()
    with torch.no_grad():
        first = read(model, ids[0]).fork() and model(ids, use_cache=False).logits[0, -1:].argmax(-1)
    assert first.item() == got[0, 200].item()
    assert logits_after(model, cache, got[0, 200:207]).argmax(-1).tolist() == got[0, 201:].tolist()
    surprised(model, budget={"share": 1.0})
    whole = model.generate(ids, **asked)
    unpatch_model(model)
    assert torch.equal(whole, model.generate(ids, **asked)) and not torch.equal(whole, got)


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"assistant_model": True}])
def test_beams_and_drafts(mode):
    model = surprised()
    ids = torch.cat([some(60), some(60), some(60)])[None]
    if "assistant_model" in mode:
        mode = {"assistant_model": tiny_model(dtype=torch.float64, layers=1)}
    asked = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(ids, **asked, **mode)
    cache = out.past_key_values
    if "num_beams" in mode:
        assert out.sequences.shape == (1, 200)
        return
    assert torch.equal(out.sequences, model.generate(ids, **asked).sequences)
    cache.settle_surprisals()
    plain = read(model, out.sequences[0, : cache.seen], chunk=180)
    plain.settle_surprisals()
    got, want = (one.surprisals.known(one.seen)[0, 1:] for one in (cache, plain))
    torch.testing.assert_close(got[:179], want[:179], rtol=0, atol=1e-5)
    assert (got >= 0).all()


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_what_was_said_fades_turn_by_turn(decay):
    model = tiny_model(dtype=torch.float64)
    ids = some(410, seed=1)
    losses = by_definition(model, ids)
    surprised(model, rule={**RULE, "decay": decay}, budget={"share": 1.0})
    cache = read(model, ids[:150])
    cache.evict()
    first = by_definition_of(model, ids[:150])
    torch.testing.assert_close(known(cache)[0], first, rtol=0, atol=1e-5)
    read(model, ids[150:280], cache)
    cache.evict()
    read(model, ids[280:], cache)
    cache.evict()
    got = known(cache)[0]
    torch.testing.assert_close(got[1:150], decay**2 * losses[1:150], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[150:280], decay * losses[150:280], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[280:], losses[280:], rtol=0, atol=1e-5)


def by_definition_of(model, ids: torch.Tensor) -> torch.Tensor:
    """As `by_definition`, of a patched model."""
    other = tiny_model(model.config.model_type, torch.float64)
    other.load_state_dict(model.state_dict())
    return by_definition(other, ids)


def test_after_an_eviction_the_rest_keeps_its_numbers():
    model = surprised()
    ids = some(280, seed=1)
    cache = read(model, ids[:150])
    cache.evict()
    before = known(cache)
    assert all(len(one) == 40 for one in before)
    read(model, ids[150:], cache)
    cache.compress(budget={"share": 1.0})
    after = known(cache)
    assert all(torch.equal(b, a[:40]) and len(a) == 170 for b, a in zip(before, after, strict=True))
    cache.compress(budget={"tokens": 60})
    assert all(len(heads[0]) == 60 for heads in keys_of_heads(cache))


def test_forks_crops_and_copies():
    model = surprised(budget={"share": 1.0})
    ids = some(300, seed=1)
    want = read(model, ids)
    want.evict()
    cache = read(model, ids[:280])
    other, copied = cache.fork(), copy.deepcopy(cache)
    read(model, some(60, seed=8), cache)  # goes another way
    cache.crop(280)
    for one in (cache, other, copied):
        read(model, ids[280:], one)
        one.prompt_end = one.seen
        one.compress()
        torch.testing.assert_close(known(one)[0], known(want)[0], rtol=0, atol=1e-5)
    far = read(model, ids)
    far.crop(20)
    read(model, ids[20:], far)
    far.compress()
    assert known(far)[0][20] == known(far)[0].max(), "what came before it is not known any more"
    torch.testing.assert_close(known(far)[0][21:], known(want)[0][21:], rtol=0, atol=1e-5)
    cache.reset()
    assert cache.surprisals.hidden is None and cache.surprisals.known(1) is None
    assert torch.equal(known(read_and_evict(model, ids, cache))[0], known(want)[0])


def read_and_evict(model, ids, cache):
    read(model, ids, cache)
    cache.evict()
    return cache


def test_a_saved_cache_goes_on_by_the_same_numbers(tmp_path):
    model = surprised()
    ids = some(300, seed=1)
    for evicted in (False, True):
        cache = read(model, ids[:150])
        if evicted:
            cache.evict()
        cache.save(tmp_path / "cache", model=model)
        loaded = LongCtxCache.load(tmp_path / "cache", model)
        for one in (cache, loaded):
            read(model, ids[150:], one)
            one.evict()
        for mine, theirs in zip(known(loaded), known(cache), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        assert torch.equal(loaded.surprisals.known(300), cache.surprisals.known(300))


def test_few_hidden_states_are_kept():
    model = surprised()
    cache = read(model, some(2000))
    assert cache.surprisals.hidden.untyped_storage().nbytes() <= 256 * 32 * 8
    with torch.no_grad():
        for one in some(600, seed=4):
            model(one[None, None], past_key_values=cache)
            assert cache.surprisals.hidden.shape[1] <= 2 * 256
    assert cache.surprisals.length > 2000


def test_questions_on_a_kept_prompt_equal_fresh_runs():
    model = surprised(budget={"share": 0.3})
    document, questions = some(140).tolist(), [some(9, seed=7).tolist(), some(13, seed=8).tolist()]
    asked = {"max_new_tokens": 8, "do_sample": False}
    handle = PromptCache(model).prefill(document)
    assert len(keys_of_heads(handle.cache)[0][0]) < 139
    want = []
    for question in questions:
        cache = read_and_evict(model, torch.tensor(document[:-1]), LongCtxCache(model))
        whole = torch.tensor([document + question])
        want.append(model.generate(whole, past_key_values=cache, **asked)[0, whole.shape[1] :].tolist())
    assert handle.ask(questions, **asked) == want


def test_logits_that_are_capped_or_scaled_are_refused():
    for family in ("gemma2", "cohere2"):
        model = random_model(Case(family, True))
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(40)
        stores = {"retrieval": {"store": "evicted", "rule": RULE, "by": "uniform"}}
        with pytest.raises(UnsupportedModelError, match="score 'surprisal' is computed from. Take another score"):
            patch_model(model, config_for(model, "retrieval", stores=stores))
        assert not hasattr(model.model, "longctx_state"), "nothing was changed"


def test_what_is_refused():
    with pytest.raises(ConfigError, match="by: got 'head' with score 'surprisal', which gives all heads of a layer"):
        surprised(by="head")
    model = surprised()
    with torch.no_grad():
        embedded = LongCtxCache(model)
        model(inputs_embeds=model.get_input_embeddings()(some(1, 150)), past_key_values=embedded)
    with pytest.raises(CacheError, match="that is not known of all of this cache: tokens came as inputs_embeds"):
        embedded.evict()
    other = copy.deepcopy(model)
    cache = read(other, some(150))
    with pytest.raises(UnsupportedModeError, match="this model was copied or unpickled since it was patched"):
        cache.evict()
    evicting(model=model, rule={"score": "key_norm"}, by="uniform")
    with pytest.raises(CacheError, match="which is kept where the config names that score"):
        read(model, some(150)).compress("surprisal")
    unpatch_model(model)
    assert not model.model._forward_hooks and not model.model._forward_hooks_with_kwargs


def test_tokens_left_by_another_score_leave_first():
    model = surprised()
    ids = some(280, seed=1)
    cache = read(model, ids[:150])
    cache.compress("key_norm")
    read(model, ids[150:], cache)
    cache.compress(budget={"tokens": 100})
    want = by_definition_of(model, ids)[150:]  # of a text that was not evicted: near enough to tell the order of things
    got = known(cache)[0]
    assert len(got) == 100 and (got == 0).sum() <= 4 and want.min() >= 0
