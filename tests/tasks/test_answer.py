"""Answers of the embedded models: right ones, the context read once, and the same as without a kept cache."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from statistics import mean

import pytest
import torch
from helpers.kinds import language_of
from transformers import AutoModelForCausalLM, DynamicCache

from hf_longctx import LongCtxCache, UnsupportedModeError, patched
from hf_longctx.assets import asset
from hf_longctx.errors import ConfigError
from hf_longctx.tasks import task_from
from hf_longctx.tasks.answer import MODES, answer, end_tokens, score

SEVERAL = "needle:variant=multi_key:needles=6:questions=3"


@functools.cache
def tiny_llama():
    return AutoModelForCausalLM.from_pretrained(asset("tiny-llama")).eval()


@contextmanager
def ways(patch: bool):
    model = tiny_llama()
    if not patch:
        yield model
        return
    with patched(model):
        yield model


@contextmanager
def forwards(model):
    """The number of tokens of every forward, and the caches that came out."""
    seen = []

    def look(module, args, kwargs, out):
        seen.append((kwargs["input_ids"].shape[1], out.past_key_values))

    handle = model.base_model.register_forward_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def from_scratch(model, ids: list[int], room: int, stop: tuple[int, ...]) -> list[int]:
    """What ``generate`` says after ``ids``, read with no cache kept from before."""
    prompt = torch.tensor([ids])
    out = model.generate(prompt, max_new_tokens=room, do_sample=False, eos_token_id=list(stop))[0, len(ids) :].tolist()
    return out[:-1] if out[-1] in stop else out


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("room", [None, 2, 7])
def test_turns_are_the_conversation_from_scratch(patch, room):
    sample = task_from(SEVERAL).make(language_of("tiny"), 400, seed=1)
    with ways(patch) as model:
        answers = answer(model, sample, "turns", room)
        ids = list(sample.context)
        for i, (question, said) in enumerate(zip(sample.questions, answers, strict=True)):
            ids += [*(sample.between if i else ()), *question.prompt]
            assert said == from_scratch(model, ids, room or question.room, sample.stop)
            assert len(said) == (room if room == 2 else 4)
            ids += said
    assert len({tuple(said) for said in answers}) == 3, "a control: three different answers"


@pytest.mark.parametrize("patch", [False, True])
def test_requests_are_each_question_from_scratch(patch):
    sample = task_from(SEVERAL).make(language_of("tiny"), 400, seed=2)
    with ways(patch) as model:
        answers = answer(model, sample, "requests")
        for question, said in zip(sample.questions, answers, strict=True):
            assert said == from_scratch(model, [*sample.context, *question.prompt], question.room, sample.stop)
    assert score(sample.questions, [language_of("tiny").decode(said) for said in answers]) == [1.0] * 3


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_context_is_read_once(patch, mode):
    sample = task_from(SEVERAL).make(language_of("tiny"), 400, seed=3)
    with ways(patch) as model, forwards(model) as seen:
        answers = answer(model, sample, mode)
    tokens = [count for count, _ in seen]
    assert tokens[0] == len(sample.context) and max(tokens[1:]) < 10
    asked = sum(len(question.prompt) for question in sample.questions)
    between = 2 * len(sample.between) if mode == "turns" else 0
    assert sum(tokens[1:]) == asked + between + sum(map(len, answers))  # the token that ended an answer is not read
    kind = LongCtxCache if patch else DynamicCache
    assert all(type(cache) is kind for _, cache in seen)
    assert len({id(cache) for _, cache in seen}) == (1 if mode == "turns" else 4)


def contents(cache) -> list[torch.Tensor]:
    """A copy of all its memory, that which nobody wrote too."""
    if isinstance(cache, LongCtxCache):
        tensors = [tensor for layer in cache.layers for tensor in layer.tensors()]
    else:
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_requests_leave_the_cache_of_the_context_alone(patch, mode):
    sample = task_from(SEVERAL).make(language_of("tiny"), 400, seed=4)
    read = []

    def look(module, args, out):
        if not read:
            read.extend([out.past_key_values, contents(out.past_key_values)])

    with ways(patch) as model:
        handle = model.base_model.register_forward_hook(look)
        answer(model, sample, mode)
        handle.remove()
    cache, before = read
    after = contents(cache)
    same = len(before) == len(after) and all(
        torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(before, after, strict=True)
    )
    assert same == (mode == "requests"), "turns are the control"
    assert (cache.get_seq_length() == len(sample.context)) == (mode == "requests")


def test_one_question_needs_no_copy():
    sample = task_from("needle").make(language_of("tiny"), 400)
    with forwards(tiny_llama()) as seen:
        answer(tiny_llama(), sample)
    assert len({id(cache) for _, cache in seen}) == 1


@pytest.mark.parametrize(
    "case", ["passkey", "needle", "needle:variant=multi_key:needles=16:questions=12", "key_value:questions=12"]
)
@pytest.mark.parametrize("patch", [False, True])
def test_the_embedded_model_answers_its_own_tasks(case, patch):
    language, task, scores = language_of("tiny"), task_from(case), []
    with ways(patch) as model:
        for seed in range(1 if "questions" in case else 3):
            sample = task.make(language, 2048, seed=seed)
            scores += score(sample.questions, [language.decode(said) for said in answer(model, sample)])
    assert mean(scores) > 0.9


def test_a_model_that_knows_nothing_answers_nothing():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_llama().config).eval()
    language = language_of("tiny")
    sample = task_from("key_value:questions=8").make(language, 512)
    answers = answer(model, sample)
    assert score(sample.questions, [language.decode(said) for said in answers]) == [0.0] * 8
    assert all(answers), "and it does say something"


def test_an_answer_ends_at_the_models_own_end_or_at_its_room():
    model, sample = tiny_llama(), task_from("needle").make(language_of("tiny"), 400, seed=1)
    (whole,) = answer(model, sample)
    assert len(whole) == 4 and end_tokens(model) == {6} == set(sample.stop)
    try:
        model.generation_config.eos_token_id = [whole[2]]
        assert answer(model, sample) == [whole[:2]] and end_tokens(model) == {whole[2]}
        model.generation_config.eos_token_id = None
        assert answer(model, sample) == [whole] and end_tokens(model) == set()
    finally:
        model.generation_config.eos_token_id = 6
    assert answer(model, sample, max_new_tokens=1) == [whole[:1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"mode": "request"}, "Did you mean 'requests'"), ({"max_new_tokens": 0}, "max_new_tokens: got 0")],
)
def test_what_is_wrong_is_refused_before_anything_is_read(arguments, message):
    with forwards(tiny_llama()) as seen, pytest.raises(ConfigError, match=message):
        answer(tiny_llama(), task_from("passkey").make(language_of("tiny"), 300), **arguments)
    assert not seen


def test_a_model_in_training_mode_is_refused():
    model = tiny_llama()
    try:
        with pytest.raises(UnsupportedModeError, match="eval"):
            answer(model.train(), task_from("passkey").make(language_of("tiny"), 300))
    finally:
        model.eval()
