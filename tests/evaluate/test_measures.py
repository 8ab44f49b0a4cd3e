"""The measures, each against a slow definition of its own, and what makes a model give them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.tiny import config_for, tiny_model

from hf_longctx import ConfigError, UnsupportedModelError, patched
from hf_longctx.cache.cache import cache_bytes
from hf_longctx.evaluate import forwards, measures
from hf_longctx.evaluate.forwards import forced, greedy, output_head, perplexity, windows
from hf_longctx.evaluate.measures import next_token, paired_bootstrap, same_tokens
from hf_longctx.model import losses

# Next token.


def slow_next_token(dense, patched):
    """Agreement, and KL of every position, number by number in float64."""
    p, q = (logits.double().softmax(-1).tolist() for logits in (dense, patched))
    kl = [sum(a * math.log(a / b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
    same = [int(a.argmax() == b.argmax()) for a, b in zip(dense, patched, strict=True)]
    return sum(same) / len(same), kl


@pytest.mark.parametrize("at_once", [7, 200, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agreement_and_kl_equal_their_definition(at_once, dtype, monkeypatch):
    monkeypatch.setattr(measures, "LOGITS", at_once)
    dense, other = (torch.randn(37, 19).mul(3).to(dtype) for _ in "ab")
    other = torch.where(torch.arange(37)[:, None] % 2 == 0, other, dense)
    found, (agreement, kl) = next_token(dense, other), slow_next_token(dense, other)
    assert found.positions == 37 and found.agreement == agreement
    assert found.kl == pytest.approx(sum(kl) / 37, rel=1e-5) and found.kl_max == pytest.approx(max(kl), rel=1e-5)
    assert 0.5 < found.agreement < 1
    reverse = next_token(other, dense)
    assert reverse.kl != pytest.approx(found.kl, rel=1e-3), "a control: KL is not symmetric"
    assert next_token(dense, dense) == measures.NextToken(37, 1.0, 0.0, 0.0)


def test_the_head_is_called_for_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(measures, "LOGITS", 100)
    head, rows = torch.nn.Linear(8, 30, bias=False).requires_grad_(False), []
    head.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    dense, other = torch.randn(2, 50, 8)
    found = next_token(dense, other, head)
    assert max(rows) == 100 // 30 and sum(rows) == 2 * 50 + 1
    want = next_token(head(dense), head(other))
    assert found.agreement == want.agreement < 1
    assert (found.kl, found.kl_max) == pytest.approx((want.kl, want.kl_max), rel=1e-5)


def test_logits_that_are_no_numbers_agree_with_nothing():
    dense, broken = torch.zeros(4, 5), torch.zeros(4, 5)
    broken[1] = math.nan  # its argmax is 0, as that of zeros
    for a, b in ((dense, broken), (broken, broken)):
        found = next_token(a, b)
        assert found.agreement == 0.75 and math.isnan(found.kl) and math.isnan(found.kl_max)


@pytest.mark.parametrize(("a", "b"), [((3, 5), (3, 6)), ((3, 5), (2, 5)), ((0, 5), (0, 5)), ((5,), (5,))])
def test_shapes_that_do_not_fit_are_refused(a, b):
    with pytest.raises(ConfigError, match="expected \\[positions, width\\]"):
        next_token(torch.zeros(a), torch.zeros(b))


# Answers.


@pytest.mark.parametrize(
    ("dense", "patched", "want"),
    [
        ([1, 2, 3], [1, 2, 3], (3, 3, 1.0)),
        ([1, 2, 3, 4], [1, 9, 3, 4], (4, 1, 0.75)),
        ([1, 2, 3, 4], [1, 2], (4, 2, 0.5)),
        ([5], [6], (1, 0, 0.0)),
        ([], [], (0, 0, 1.0)),
        ([], [1], (1, 0, 0.0)),
    ],
)
def test_answers_are_compared_position_by_position(dense, patched, want):
    for a, b in ((dense, patched), (patched, dense)):
        found = same_tokens(a, b)
        assert (found.compared, found.prefix, found.equal) == want


# Bootstrap.


def slow_bootstrap(dense, patched, confidence, resamples, seed):
    """The same draws, one question at a time, and percentiles from the sorted means."""
    rng, n = np.random.default_rng(seed), len(dense)
    means = []
    for draw in rng.integers(n, size=(resamples, n)):
        means.append(sum(patched[i] - dense[i] for i in draw) / n)
    means.sort()

    def at(share):
        place = share * (resamples - 1)
        low = math.floor(place)
        high = min(low + 1, resamples - 1)
        return means[low] + (place - low) * (means[high] - means[low])

    return at((1 - confidence) / 2), at((1 + confidence) / 2)


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_interval_equals_its_definition(confidence):
    rng = np.random.default_rng(7)
    dense, patched = rng.random(23) < 0.9, rng.random(23) < 0.6
    found = paired_bootstrap(dense, patched, confidence=confidence, resamples=301, seed=5)
    low, high = slow_bootstrap([*map(int, dense)], [*map(int, patched)], confidence, 301, 5)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)
    assert found.difference == pytest.approx(patched.mean() - dense.mean()) and found.pairs == 23
    assert found.low < found.difference < found.high
    assert paired_bootstrap(dense, patched, confidence=confidence, resamples=301, seed=5) == found
    scores = rng.random(23)
    assert paired_bootstrap(dense, scores, seed=5) != paired_bootstrap(dense, scores, seed=6)


def test_pairs_are_drawn_together_and_the_width_is_that_of_the_normal_approximation():
    rng = np.random.default_rng(3)
    dense = rng.random(600) < 0.7
    patched = dense & (rng.random(600) < 0.95)
    found = paired_bootstrap(dense, patched, seed=1)
    spread = 1.96 * (patched.astype(float) - dense).std() / math.sqrt(600)
    assert found.low == pytest.approx(found.difference - spread, abs=0.1 * spread)
    assert found.high == pytest.approx(found.difference + spread, abs=0.1 * spread)
    apart = paired_bootstrap(dense, rng.permutation(patched), seed=1)
    assert apart.high - apart.low > 3 * (found.high - found.low), "a control: the same hits, not paired"


def test_draws_in_pieces_are_the_same_draws(monkeypatch):
    dense, patched = [0, 1, 1, 0, 1, 1, 1], [1, 1, 0, 0, 1, 0, 0]
    whole = paired_bootstrap(dense, patched, resamples=200)
    monkeypatch.setattr(measures, "DRAWS", 50)
    assert paired_bootstrap(dense, patched, resamples=200) == whole


def test_the_edges_of_the_bootstrap():
    one = paired_bootstrap([1], [0])
    assert (one.difference, one.low, one.high, one.pairs) == (-1.0, None, None, 1)
    same = paired_bootstrap([True, False, True], [True, False, True])
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)
    worse = paired_bootstrap([1, 1], [0, 0])
    assert (worse.difference, worse.low, worse.high) == (-1.0, -1.0, -1.0)
    for wrong in (([], []), ([1], [1, 0])):
        with pytest.raises(ConfigError, match="as many of both"):
            paired_bootstrap(*wrong)
    for wrong in (([1, math.nan], [0, 1]), ([1], [math.inf])):
        with pytest.raises(ConfigError, match=f"1 of {len(wrong[0])} results that are no finite"):
            paired_bootstrap(*wrong)
    for wrong in ({"confidence": 1.0}, {"confidence": 0.0}, {"resamples": 0}):
        with pytest.raises(ConfigError, match="confidence must lie between"):
            paired_bootstrap([1, 0], [0, 0], **wrong)


# Perplexity.


@pytest.mark.parametrize("tokens", [2, 9, 10, 11, 40, 41])
@pytest.mark.parametrize(("window", "context"), [(10, 1), (10, 5), (10, 9), (41, 20), (100, 50)])
def test_every_token_but_the_first_is_scored_once_with_its_context(tokens, window, context):
    scored = []
    for begin, first, end in windows(tokens, window, context):
        assert end - begin <= window and end <= tokens
        assert all(i - begin >= min(context, i) for i in range(first, end))
        scored += range(first, end)
    assert scored == list(range(1, tokens))


def slow_perplexity(model, ids, window, context):
    """One forward per token, over exactly the tokens its window puts before it."""
    loss = []
    for i in range(1, len(ids)):
        rounds = 0 if i < window else 1 + (i - window) // (window - context)
        before = ids[rounds * (window - context) : i]
        loss.append(-model(before[None]).logits[0, -1].double().log_softmax(-1)[ids[i]].item())
    return sum(loss)


@pytest.mark.parametrize("at_once", [97 * 3, 10**9])
@pytest.mark.parametrize(("window", "context"), [(16, 1), (16, 12), (50, 25), (64, 10)])
@torch.no_grad()
def test_perplexity_equals_its_definition(window, context, at_once, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS", at_once)
    model, ids = tiny_model(), torch.randint(3, 97, (50,))
    found = perplexity(model, ids, window=window, context=context)
    want = slow_perplexity(model, ids, window, context)
    assert found.tokens == 49 and found.nll == pytest.approx(want, rel=1e-5)
    assert found.value == pytest.approx(math.exp(want / 49), rel=1e-5)
    with patched(model, config_for(model, "streaming", sink=1, recent=4)):
        other = perplexity(model, ids, window=window, context=context)
        assert other.nll == pytest.approx(slow_perplexity(model, ids, window, context), rel=1e-5)
    assert other.nll != pytest.approx(found.nll, rel=1e-3), "a control: the patched model predicts otherwise"


def test_the_default_window_is_what_the_model_was_made_for_or_the_text():
    model, ids = tiny_model(), torch.randint(3, 97, (40,))
    assert perplexity(model, ids) == perplexity(model, ids, window=40, context=20)
    model.config.max_position_embeddings = 16
    assert perplexity(model, ids) == perplexity(model, ids, window=16, context=8)
    assert measures.Perplexity(800.0, 1).value == math.inf


@pytest.mark.parametrize(
    ("ids", "given", "message"),
    [
        ((40,), {"window": 16, "context": 16}, "less than window=16"),
        ((40,), {"window": 16, "context": 0}, "at least 1"),
        ((1,), {}, "at least 2 tokens"),
        ((1, 40), {}, "shape \\(1, 40\\)"),
    ],
)
def test_texts_and_windows_that_do_not_fit_are_refused(ids, given, message):
    with pytest.raises(ConfigError, match=message):
        perplexity(tiny_model(), torch.ones(ids, dtype=torch.long), **given)


# What a model is made to do.


@pytest.mark.parametrize("chunk", [None, 1, 7, 30])
def test_greedy_gives_what_generate_gives(chunk):
    model, ids = tiny_model(), torch.randint(3, 97, (1, 30))
    for roles in (None, "mixed"):
        with patched(model, config_for(model, roles or "retrieval")):
            got = greedy(model, ids, 12, chunk=chunk)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, use_cache=True
            )
            assert got.tokens == tuple(out[0, 30:].tolist())
            if chunk is None:  # chunks may leave other spare room
                assert got.cache_bytes == cache_bytes(model(ids).past_key_values)
    assert got.prefill_s > 0 and got.decode_ms > 0 and len(got.tokens) == 12
    assert greedy(model, ids, 1, chunk=chunk).decode_ms is None
    whole = greedy(model, ids, 12, chunk=chunk).tokens
    stopped = greedy(model, ids, 12, stop={whole[3]}, chunk=chunk).tokens
    assert stopped == whole[: whole.index(whole[3]) + 1]


def test_dense_cache_bytes_are_those_of_its_tensors():
    model = tiny_model()
    cache = model(torch.randint(3, 97, (2, 21))).past_key_values
    assert cache_bytes(cache) == 3 * 2 * 2 * 4 * 21 * 8 * 4  # layers, k and v, rows, KV heads, tokens, head_dim, bytes
    windowed = tiny_model("mistral", sliding=8)
    cache = windowed(torch.randint(3, 97, (1, 21))).past_key_values
    assert cache.layers[0].keys.shape[2] == 7
    assert cache_bytes(cache) == 3 * 2 * 4 * 21 * 8 * 4, "the last 7 keys are a view of all 21"


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("last", [0, 5, 29])
@torch.no_grad()
def test_forced_states_predict_the_end_of_the_prompt_and_the_answer(last, chunk, monkeypatch):
    monkeypatch.setattr(forwards, "STEP", 4)
    model, ids, answer = tiny_model(dtype=torch.float64), torch.randint(3, 97, (1, 30)), torch.randint(3, 97, (11,))
    for roles in (None, "streaming"):
        with patched(model, config_for(model, roles or "retrieval", recent=8)):
            got = output_head(model)(forced(model, ids, answer, last, chunk))
            whole = model(torch.cat([ids[0], answer])[None], use_cache=False).logits[0]
            want = whole[30 - 1 - last : 30 + 11 - 1]
            assert got.shape == want.shape == (last + 11, 97)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
            assert not torch.allclose(got, whole[30 - last : 30 + 11], atol=1e-3), "a control: one position further"


def test_logits_of_nan_are_refused():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    for start in (lambda: output_head(model), lambda: perplexity(model, torch.arange(3, 20))):
        with pytest.raises(ConfigError, match="logits of this model are NaN.*bfloat16 or float32"):
            start()


def test_logits_made_in_another_way_are_refused():
    model = tiny_model()
    output_head(model)
    model.lm_head.register_forward_hook(lambda module, args, out: out)
    output_head(model)
    forward = type(model).forward

    def capped(*args, **kwargs):
        out = forward(model, *args, **kwargs)
        out.logits = 2 * torch.tanh(out.logits / 2)
        return out

    model.forward = capped
    with pytest.raises(UnsupportedModelError, match="not its output embedding"):
        output_head(model)
    with pytest.raises(UnsupportedModelError, match="not its output embedding"):
        perplexity(model, torch.arange(3, 20))
