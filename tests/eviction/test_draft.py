"""``score: draft``: its votes by eager attention of prompt and draft, and what generate() goes on from."""

from __future__ import annotations

import pytest
import torch
from helpers.config_cases import refused
from helpers.evicting import evicting, keys_of_heads, logits_after, read, some, state_of_heads
from helpers.method_cases import eager_weights
from helpers.tiny import tiny_model
from torch.nn.functional import max_pool1d

from hf_longctx import CacheError, ConfigError, UnsupportedModelError, report
from hf_longctx.eviction.draft import Draft
from hf_longctx.eviction.snapkv import Snapkv
from hf_longctx.layout.rows import Rows
from hf_longctx.prompts.draft import draft_scores

RULE = {"score": "draft", "window": 8}


def drafting(model=None, **store):
    return evicting(model=model, **{"rule": RULE, "by": "uniform", "budget": {"tokens": 40}, **store})


def by_definition(model, ids, answer, window=8, pool=7, votes="max") -> torch.Tensor:
    """Scores ``[layers, n, T - 1]``: the last token of the prompt is read with the draft."""
    maps = eager_weights(model, torch.cat([ids, answer])[None]).double()
    text = len(ids) - 1
    rows = maps[:, :, text - window :, : text - window]
    rows = rows.amax(2) if votes == "max" else rows.mean(2)
    rows = max_pool1d(rows, pool, stride=1, padding=pool // 2).unflatten(1, (-1, 2))
    found = rows.amax(2) if votes == "max" else rows.mean(2)
    return torch.cat([found, torch.zeros(*found.shape[:2], window)], 2)


def judged(cache) -> torch.Tensor:
    return torch.stack([torch.stack(heads) for heads in state_of_heads(cache, "judged")])


@pytest.mark.spanning
@pytest.mark.parametrize("fields", [{}, {"votes": "mean"}, {"pool": 1}, {"window": 20}])
@pytest.mark.parametrize("tokens", [0, 1, 12, 300])
def test_the_last_queries_and_the_drafts_vote(fields, tokens):
    model, small = tiny_model(dtype=torch.float64), tiny_model("qwen2", layers=1)
    ids = some(100, seed=2)
    answer = small.generate(ids[None], max_new_tokens=tokens, do_sample=False)[0, 100:] if tokens else ids[:0]
    assert len(answer) == tokens
    want = by_definition(model, ids, answer, **fields)
    other = by_definition(model, ids, some(len(answer), seed=9), **fields)
    drafting(model, rule={**RULE, **fields})
    cache = draft_scores(model, small, ids, tokens=tokens, budget={"share": 1.0}, chunk_size=30)
    torch.testing.assert_close(judged(cache), want, rtol=0, atol=2e-6)
    assert (judged(cache) - other).abs().max() > 1e-4 or not tokens, "a control"


@pytest.mark.parametrize("by", ["uniform", "head", "model"])
def test_without_a_draft_it_is_snapkv(by):
    """Of one query more: the last token of the prompt is read with the draft, which has none."""
    ids = some(100, seed=2)
    model = drafting(rule={**RULE, "votes": "mean"}, by=by, budget={"tokens": 39}, recent=7)
    got = keys_of_heads(draft_scores(model, None, ids, tokens=0))
    snap = {"score": "snapkv", "window": 9, "pool": 7, "pooling": "max"}
    drafting(model, rule=snap, by=by, budget={"tokens": 40}, recent=8)
    cache = read(model, ids)
    cache.evict()
    for mine, theirs in zip(got, keys_of_heads(cache), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b[:-1], rtol=0, atol=1e-12)
    drafting(model, rule={**snap, "window": 8}, by=by, budget={"tokens": 40})
    control = read(model, ids)
    control.evict()
    left = zip(sum(keys_of_heads(control), []), sum(keys_of_heads(cache), []), strict=True)
    same = [torch.equal(x, y) for x, y in left]
    assert not all(same), "a control"


@pytest.mark.parametrize("by", ["uniform", "head", "model"])
def test_generate_goes_on_from_what_is_left(by):
    model = drafting(by=by)
    small, ids = tiny_model("qwen2", layers=1), some(1, 150)
    asked = {"max_new_tokens": 12, "do_sample": False}
    want = model.generate(ids, **asked)  # a config with this score is dense until it is asked
    assert "which score draft waits for" in str(report(model))
    whole = draft_scores(model, small, ids, tokens=12, budget={"share": 1.0})
    assert whole.seen == 149 and torch.equal(model.generate(ids, past_key_values=whole, **asked), want)
    cache = draft_scores(model, small, ids, tokens=12)
    assert sum(len(k) for heads in keys_of_heads(cache) for k in heads) == 12 * 40
    left = cache.fork()
    out = model.generate(ids, past_key_values=cache, **asked)
    assert out.shape == (1, 162) and cache.seen == 161
    assert sum(len(k) for heads in keys_of_heads(cache) for k in heads) == 12 * (40 + 12)
    again = logits_after(model, left, out[0, 149:161]).argmax(-1)
    assert again.tolist() == out[0, 150:].tolist()
    assert not torch.equal(out, want), "a control"


def test_drafts_of_the_assistant_are_none_of_this():
    model = drafting()
    ids, small = some(1, 150), tiny_model(dtype=torch.float64, layers=1)
    asked = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, assistant_model=small, **asked), model.generate(ids, **asked))


def test_a_second_turn_votes_on_all_that_is_left():
    model = drafting(by="head")
    small, ids = tiny_model("qwen2", layers=1), some(150)
    cache = draft_scores(model, small, ids, tokens=5)
    read(model, some(140, seed=3), cache)
    cache.compress(follows=some(4))
    assert sum(len(k) for heads in keys_of_heads(cache) for k in heads) == 12 * 40
    left = zip(sum(state_of_heads(cache, "judged"), []), sum(keys_of_heads(cache), []), strict=True)
    assert all(len(x) == len(k) for x, k in left)


def test_what_is_refused():
    refused(lambda: Draft(pool=4), "pool: got 4, expected an odd number")
    model, ids = drafting(), some(60)
    with pytest.raises(ConfigError, match="follows: got no tokens, and score 'draft' looks at what comes after"):
        read(model, ids).compress()
    with pytest.raises(ConfigError, match="ids: got 1 tokens, expected at least two"):
        draft_scores(model, None, ids[:1], tokens=0)
    with pytest.raises(ConfigError, match="draft: got None with tokens=3"):
        draft_scores(model, None, ids, tokens=3)
    with pytest.raises(ConfigError, match="tokens: got -1, expected a whole number from 0"):
        draft_scores(model, None, ids, tokens=-1)
    with pytest.raises(UnsupportedModelError, match="call patch_model"):
        draft_scores(tiny_model(), None, ids, tokens=0)

    class Wide(torch.nn.Module):
        """A draft model of another tokenizer."""

        def get_input_embeddings(self):
            return torch.nn.Embedding(1000, 2)

        def generate(self, ids, **how):
            return torch.cat([ids, torch.tensor([[500]])], 1)

    with pytest.raises(ConfigError, match="draft: Wide answered with token 500, and the model has 97"):
        draft_scores(model, Wide(), ids, tokens=1)
    cache = read(model, ids)
    with torch.no_grad():
        model(some(1, 1), past_key_values=cache)
    with pytest.raises(CacheError, match="score 'draft' asks for the queries of the last tokens before the draft"):
        cache.compress(follows=[5])
    drafting(model, rule={"score": "key_norm"})
    with pytest.raises(CacheError, match="it decoded since, or was filled by hand. Let the config name that score"):
        read(model, ids).compress("draft", follows=[5])
    drafting(model, rule={"score": "snapkv", "window": 8})
    cache = read(model, some(600))
    with pytest.raises(CacheError, match="score 'draft' asks for the last 300 queries, and this cache has kept 263"):
        cache.compress(Draft(window=300), follows=[5])
    cache.compress(Draft(window=32), follows=[5])
    assert Snapkv(window=9).queries == Draft(window=9).queries


def test_a_draft_of_one_token_is_not_read_by_a_step_that_shows_no_queries():
    cache = read(drafting(), some(60))
    (store,) = cache.own[0].evicting
    rows = Rows(1, 60, 1)
    assert store.place(rows) is not None
    store.watcher = print
    assert store.place(rows) is None
