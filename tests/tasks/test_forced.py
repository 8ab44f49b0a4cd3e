"""The likelihood of expected answers: equal to one plain forward over everything, however the context was read."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longctx import patched
from hf_longctx.assets import asset
from hf_longctx.cache.seam import cache_of
from hf_longctx.errors import UnsupportedModeError
from hf_longctx.tasks import task_from
from hf_longctx.tasks.forced import forced_answers, forced_over
from hf_longctx.tasks.language import language_for


@pytest.fixture(scope="module")
def llama():
    path = asset("tiny-llama")
    model = AutoModelForCausalLM.from_pretrained(path).double().eval()
    return model, language_for(AutoTokenizer.from_pretrained(path))


def sample_of(llama, task="key_value:questions=3", length=600):
    return task_from(task).make(llama[1], length, None, 5)


def plain(model, sample, question):
    """Of one forward over the context, the question and the expected answer, without a cache."""
    ids = torch.tensor([[*sample.context, *question.prompt, *question.target]])
    count = len(question.target)
    logits = model(ids, use_cache=False).logits[0, -count - 1 : -1].log_softmax(-1)
    want = ids[0, -count:]
    return -logits[range(count), want].sum().item(), count, bool((logits.argmax(-1) == want).all())


@pytest.mark.parametrize("way", ["dense", "patched", "wrong heads"])
@pytest.mark.parametrize("task", ["needle", "key_value:questions=3"])
def test_it_equals_one_forward_over_everything(llama, way, task):
    model, _ = llama
    sample = sample_of(llama, task)
    heads = {"heads": {"retrieval_fraction": 0.0625}} if way == "wrong heads" else {}
    with nullcontext() if way == "dense" else patched(model, "auto", **heads), torch.no_grad():
        want = [plain(model, sample, question) for question in sample.questions]
        for options in ({}, {"chunk_size": 64}, {"chunk_size": 1 + len(sample.context)}, {"together": True}):
            found = forced_answers(model, sample, **options)
            assert [(one.tokens, one.right) for one in found] == [one[1:] for one in want]
            assert [one.nll for one in found] == pytest.approx([one[0] for one in want], abs=1e-6)


def test_a_cache_that_has_read_the_context_is_kept_and_read_once(llama):
    model, _ = llama
    sample = sample_of(llama)
    for context in (nullcontext(), patched(model, "auto")):
        with context, torch.no_grad():
            want = forced_answers(model, sample)
            cache = cache_of(model(torch.as_tensor(sample.context)[None], use_cache=True))
            assert forced_over(model, sample, cache) == forced_over(model, sample, cache) == want
            assert forced_over(model, sample, cache, keep=False) == want
            assert forced_over(model, sample, cache) != want, "a control: now it has read more"


def test_wrong_heads_make_the_answers_unlikely(llama):
    model, _ = llama
    sample = sample_of(llama, length=2000)
    dense = forced_answers(model, sample)
    with patched(model, "auto", heads={"retrieval_fraction": 0.0625}):
        wrong = forced_answers(model, sample)
    assert all(one.right and one.nll / one.tokens < 0.1 for one in dense)
    assert not any(one.right for one in wrong) and all(one.nll / one.tokens > 1 for one in wrong)


def test_another_answer_is_unlikely(llama):
    """So that it is the question's own answer which is scored."""
    model, _ = llama
    sample = sample_of(llama)
    one, other, _ = sample.questions
    swapped = (type(one)(**{**vars(one), "target": other.target}),)
    found = forced_answers(model, type(sample)(**{**vars(sample), "questions": swapped}))
    assert not found[0].right and found[0].nll / found[0].tokens > 2


def test_a_model_in_training_mode_is_refused(llama):
    model, _ = llama
    model.train()
    try:
        with pytest.raises(UnsupportedModeError, match="eval"):
            forced_answers(model, sample_of(llama))
    finally:
        model.eval()
