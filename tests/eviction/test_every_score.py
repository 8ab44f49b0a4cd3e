"""What holds for every eviction score that the folder lists."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from helpers.seen import CASES, WORDS, Prompt, rule_of

from hf_longctx.config.words import build, dump, load, words
from hf_longctx.layout.scores import Scores

PROMPT = [name for name in CASES if load("eviction", WORDS[name]).moment == "prompt"]
GATHERING = [name for name in PROMPT if load("eviction", WORDS[name]).gathers]
every = pytest.mark.parametrize("case", PROMPT)


def same(got, want, atol=1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def test_every_word_is_here():
    assert set(WORDS.values()) == set(words("eviction")) and len(GATHERING) > 3
    assert all(load("eviction", word).paper for word in words("eviction"))


@every
def test_a_config_names_it(case):
    rule = rule_of(case)
    assert build("eviction", dump(rule, "score"), "score", "rule", "retrieval") == rule and hash(rule) is not None


@pytest.mark.quick
@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_finite_and_wide(case, dtype):
    prompt = Prompt.random(dtype=dtype)
    found = prompt.score(rule_of(case))
    assert found.shape == prompt.k.shape[:3] and found.isfinite().all()
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert len(found[0, 0].unique()) > 3


@every
def test_halves_are_scored_in_float32(case):
    prompt = Prompt.random(dtype=torch.bfloat16)
    wide = Prompt(*(x.double() for x in (prompt.q, prompt.k, prompt.v)))
    found, want = prompt.score(rule_of(case)), wide.score(rule_of(case))
    same(found.double(), want, 1e-4 * want.abs().max().item())


@every
def test_asked_again_it_says_the_same(case):
    prompt = Prompt.random()
    torch.manual_seed(1)
    once = prompt.score(rule_of(case))
    torch.manual_seed(2)
    assert torch.equal(prompt.score(rule_of(case)), once)


@every
def test_a_batch_equals_its_sequences_alone(case):
    prompt = Prompt.random(batch=3)
    together = prompt.score(rule_of(case))
    for row in range(3):
        same(prompt.alone(row).score(rule_of(case))[0], together[row])
    assert (together[0] - together[1]).abs().max() > 1e-4


@pytest.mark.parametrize("case", GATHERING)
@pytest.mark.parametrize("cuts", [(1,), (2, 3, 30), tuple(range(1, 40))])
def test_pieces_equal_one_shot(case, cuts):
    prompt = Prompt.random()
    want = prompt.score(rule_of(case))
    same(prompt.score(rule_of(case), cuts), want)
    half = prompt.gathered(rule_of(case))
    last = prompt.gathered(rule_of(case), low=38)  # most queries were not gathered: a control
    half.state.clear()
    half.state.update(last.state)
    assert (rule_of(case).score(half) - want).abs().max() > 1e-6


@every
def test_tensors_are_only_replaced(case):
    rule, prompt = rule_of(case), Prompt.random()
    whole = copy.deepcopy(prompt)
    state: dict[str, torch.Tensor] = {}
    if rule.gathers:
        rule.gather(prompt.seen(0, 30, rule, state))
    shared, before = dict(state), copy.deepcopy(state)
    assert all(x.shape[:2] in (prompt.q.shape[:2], prompt.k.shape[:2]) for x in state.values())
    assert all(state[name].shape == (2, 2, 30) for name in rule.by_token if name in state)
    if rule.gathers:
        rule.gather(prompt.seen(30, 40, rule, state))
        assert any(state[name] is not shared[name] for name in state)
    seen = dataclasses.replace(prompt.gathered(rule), state=state)
    rule.score(seen)
    assert all(torch.equal(shared[name], before[name]) for name in before)
    assert all(torch.equal(getattr(prompt, name), getattr(whole, name)) for name in ("q", "k", "v"))


@every
def test_it_goes_on_after_an_eviction(case):
    rule, prompt = rule_of(case), Prompt.random(60)
    kept = [0, 1, 2, 3, 4, 9, 10, 17, 25, 30, 38, 39]
    seen = prompt.after_eviction(rule, kept, 40)
    found = rule.score(seen)
    assert found.shape == (2, 2, len(kept) + 20) and found.isfinite().all()
    everything = prompt.after_eviction(rule, range(40), 40)
    same(rule.score(everything), rule.score(prompt.gathered(rule, (40,))))


@pytest.mark.parametrize("case", GATHERING)
def test_it_knows_tokens_whose_queries_were_not_gathered(case):
    rule, prompt = rule_of(case), Prompt.random(43)
    state: dict[str, torch.Tensor] = {}
    rule.gather(prompt.seen(0, 40, rule, state))
    seen = dataclasses.replace(prompt.gathered(rule), state=state)
    found = rule.score(seen)
    assert found.shape == (2, 2, 43) and found.isfinite().all()


@pytest.mark.parametrize("case", GATHERING)
def test_nothing_gathered_is_no_fault(case):
    rule, prompt = rule_of(case), Prompt.random(5)
    assert rule.score(dataclasses.replace(prompt.gathered(rule), state={})).isfinite().all()


@every
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_short_prompts(case, tokens):
    found = Prompt.random(tokens).score(rule_of(case))
    assert found.shape == (2, 2, tokens) and found.isfinite().all()


@every
def test_a_device_does_it_without_the_host(case):
    """On ``meta``, a tensor of the host among them is an error, and so is a number that is read."""
    prompt = Prompt.random()
    elsewhere = Prompt(*(x.to("meta") for x in (prompt.q, prompt.k, prompt.v)))
    found = elsewhere.score(rule_of(case), (10,))
    assert found.device.type == "meta" and found.shape == (2, 2, 40)


@every
def test_what_else_makes_scores(case):
    """A cap, sinks without a value and a first token's bias change what attention weights say, and nothing breaks."""
    prompt = Prompt.random()
    scores = Scores(0.9, 2.0, torch.randn(6), torch.tensor([3.0, 0.0, 0.0, 1.0, 0.0, 0.0]))
    other = Prompt(prompt.q, prompt.k, prompt.v, scores)
    rule = rule_of(case)
    found = other.score(rule)
    assert found.isfinite().all()
    if rule.gathers or rule.queries:
        assert (found - prompt.score(rule)).abs().max() > 1e-6
