"""What a variant does on a case: the runner's answers, real bytes, and states that follow the given answers."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longctx import LongCtxCache, patched
from hf_longctx.assets import asset
from hf_longctx.evaluate.meter import Meter, answers_of, forced_of
from hf_longctx.tasks import task_from
from hf_longctx.tasks.answer import MODES, answer
from hf_longctx.tasks.forced import forced_answers, scored
from hf_longctx.tasks.language import language_for

WRONG = {"retrieval_fraction": 0.0625}


@pytest.fixture(scope="module")
def llama():
    path = asset("tiny-llama")
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    return model, language_for(AutoTokenizer.from_pretrained(path))


def sample_of(llama, task="key_value:questions=3", length=600, depth=0.3):
    return task_from(task).make(llama[1], length, depth, 5)


def way(model, name):
    return {
        "dense": nullcontext,
        "patched": lambda: patched(model, "auto"),
        "wrong": lambda: patched(model, "auto", heads=WRONG),
    }[name]()


@pytest.mark.parametrize("name", ["dense", "patched"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", ["needle", "key_value:questions=3"])
def test_the_answers_are_those_of_the_runner(llama, name, mode, task):
    sample = sample_of(llama, task)
    with way(llama[0], name):
        found = answers_of(llama[0], sample, mode, None)
        assert found.said == answer(llama[0], sample, mode)
    assert found.states.shape == (sum(len(one) + 1 for one in found.said), 128)
    assert found.costs.prefill_s > 0 and found.costs.decode_ms > 0


def slow_states(model, sample, along, mode):
    """Hidden states that predict every answer and what follows it, of one forward over everything before."""
    read, found = sample.context.tolist(), []
    for i, (question, ids) in enumerate(zip(sample.questions, along, strict=True)):
        before = read if mode == "turns" else sample.context.tolist()
        before = [*before, *(sample.between if i and mode == "turns" else ()), *question.prompt.tolist()]
        read = [*before, *ids]
        out = model.model(input_ids=torch.tensor(read)[None], use_cache=False)
        found.append(out.last_hidden_state[0, len(before) - 1 :])
    return torch.cat(found)


@pytest.mark.parametrize("name", ["dense", "patched"])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_the_states_follow_the_given_answers(llama, name, mode):
    model, sample = llama[0], sample_of(llama)
    along = [[10, 11, 12], [], [13]]
    with way(model, name):
        states = answers_of(model, sample, mode, None, along).states
        want = slow_states(model, sample, along, mode)
    torch.testing.assert_close(states, want, rtol=1e-3, atol=1e-3)
    with way(model, "wrong"):
        wrong = answers_of(model, sample, mode, None, along).states
    assert (wrong - want).abs().max() > 0.1, "a control"


def test_the_states_of_a_single_question(llama):
    sample = sample_of(llama, "needle")
    with torch.no_grad():
        found = answers_of(llama[0], sample, "requests", None)
        torch.testing.assert_close(
            found.states, slow_states(llama[0], sample, found.said, "requests"), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("chunk", [None, 100])
def test_bytes_are_those_of_the_context(llama, chunk):
    model, sample = llama[0], sample_of(llama)
    context = len(sample.context)
    dense = answers_of(model, sample, "turns", chunk).costs
    assert dense.cache_bytes == 4 * 2 * 4 * 32 * 4 * context
    with way(model, "patched"), torch.no_grad():
        kept = answers_of(model, sample, "turns", chunk).costs
        cache = LongCtxCache(model)
        for piece in torch.as_tensor(sample.context)[None].split(chunk or context, 1):
            model(piece, past_key_values=cache)
        assert kept.cache_bytes == cache.nbytes < dense.cache_bytes


@pytest.mark.parametrize("chunk", [None, 100])
def test_a_meter_notes_every_read_once(llama, chunk, monkeypatch):
    model, sample = llama[0], sample_of(llama)
    brought = []
    real = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, ids, **more: (brought.append(ids.shape[1]), real(self, ids, **more))[1]
    )
    meters = []
    monkeypatch.setattr(Meter, "costs", lambda self, held: meters.append(self))
    said = answers_of(model, sample, "requests", chunk).said
    context = len(sample.context)
    prompts = [[len(question.prompt)] + [1] * len(one) for question, one in zip(sample.questions, said, strict=True)]
    assert [tokens for tokens, _ in meters[0].noted] == [context, *(n for one in prompts for n in one)]
    forced = sum(len(question.prompt) + len(question.target) - 1 for question in sample.questions)
    assert sum(brought) == context + forced + sum(n for one in prompts for n in one)
    assert max(brought) == (chunk or context)


def test_costs_take_the_context_the_first_question_and_single_tokens():
    meter = Meter.__new__(Meter)
    meter.noted = [(500, 2.0), (4, 0.5), (1, 0.1), (1, 0.3), (4, 9.0), (1, 0.2)]
    costs = meter.costs(77)
    assert (costs.cache_bytes, costs.prefill_s) == (77, 2.5)
    assert costs.decode_ms == pytest.approx(200)
    meter.noted = meter.noted[:2]
    assert meter.costs(77).decode_ms is None


def figures(expected) -> list[tuple[int, bool]]:
    return [(one.tokens, one.right) for one in expected]


@pytest.mark.parametrize("name", ["dense", "patched", "wrong"])
@pytest.mark.parametrize("task", ["needle", "key_value:questions=3"])
def test_the_expected_answers_are_scored_as_forced_answers_does(llama, name, task):
    sample = sample_of(llama, task)
    with way(llama[0], name):
        want = forced_answers(llama[0], sample, 100)
        for found in (answers_of(llama[0], sample, "requests", 100), forced_of(llama[0], sample, "requests", 100)):
            assert figures(found.expected) == figures(want)
            assert [one.nll for one in found.expected] == pytest.approx([one.nll for one in want], abs=1e-4)


@pytest.mark.parametrize("name", ["dense", "patched", "wrong"])
@torch.no_grad()
def test_in_turns_each_question_follows_the_expected_answers_before_it(llama, name):
    model, sample = llama[0], sample_of(llama)
    targets = [question.target for question in sample.questions]
    with way(model, name):
        states = slow_states(model, sample, [one.tolist() for one in targets], "turns")
        found = [run(model, sample, "turns", None).expected for run in (answers_of, forced_of)]
        alone = forced_of(model, sample, "requests", None).expected
    pieces = states.split([len(one) + 1 for one in targets])
    want = [scored(model.lm_head(piece[:-1]), torch.as_tensor(one)) for piece, one in zip(pieces, targets, strict=True)]
    for expected in found:
        assert figures(expected) == figures(want)
        assert [one.nll for one in expected] == pytest.approx([one.nll for one in want], rel=1e-3, abs=3e-6)
    assert alone[1].nll != pytest.approx(want[1].nll, rel=1e-3, abs=3e-6), "a control: the turns before matter"


@pytest.mark.parametrize("mode", MODES)
def test_forced_decodes_nothing_and_reads_each_token_once(llama, mode, monkeypatch):
    model, sample = llama[0], sample_of(llama)
    brought = []
    real = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, ids, **more: (brought.append(ids.shape[1]), real(self, ids, **more))[1]
    )
    found = forced_of(model, sample, mode, None)
    between = len(sample.between) + 1 if mode == "turns" else 0
    asked = [len(one.prompt) + len(one.target) - 1 + between * bool(i) for i, one in enumerate(sample.questions)]
    assert brought == [len(sample.context), *asked]
    assert found.said is None and found.costs.decode_ms is None and found.costs.prefill_s > 0
    assert len(found.states) == sum(len(question.target) for question in sample.questions)
