"""``query_focused`` and ``kvzip`` equal their definitions, written over eager attention matrices of whole texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.every_family import Case
from helpers.every_family import tiny_model as random_model
from helpers.method_cases import Noise, eager_weights, group_max, probe_of, run
from helpers.tiny import FAMILIES, tiny_model
from helpers.tiny_tokenizer import byte_bpe

from hf_longctx import identify
from hf_longctx.eviction import _columns
from hf_longctx.identification.methods.kvzip import BEFORE, Kvzip
from hf_longctx.identification.methods.query_focused import QueryFocused
from hf_longctx.model import attention_mass as _attention
from hf_longctx.tasks.documents import documents_for

CASES = [*FAMILIES, "gemma2", "gpt_oss"]  # the last two with a softcap and with sinks, and with layers of windows


def model_and_probe(family: str, **kwargs):
    if family in FAMILIES:
        model = tiny_model(family, dtype=torch.float64)
        return model, probe_of(model, **kwargs)
    model = random_model(Case(family, True))
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 0.2  # so that no softmax is 0 and 1
    kinds = model.config.layer_types
    return model, probe_of(
        model, windowed=tuple(i for i, kind in enumerate(kinds) if kind != "full_attention"), **kwargs
    )


def compare(got, want, model, probe) -> None:
    """With the float32 softmax of Transformers' eager attention; a control is another order of the layers' heads."""
    full = [i for i in range(probe.layers) if i not in probe.windowed]
    want = group_max(want, model)
    torch.testing.assert_close(got[full], want[full], rtol=0, atol=2e-6)
    assert not torch.allclose(got[full], want[full].flip(1), rtol=0, atol=1e-4)
    assert (got[list(probe.windowed)] == 0).all()


def drop_low(one: torch.Tensor) -> torch.Tensor:
    """The sum over a fact ``[tokens]`` without what is more than two deviations below its mean."""
    values = one.tolist()
    mean = sum(values) / len(values)
    deviation = (sum((x - mean) ** 2 for x in values) / (len(values) - 1)) ** 0.5
    return torch.tensor(sum(x for x in values if x >= mean - 2 * deviation), dtype=torch.float64)


@pytest.mark.parametrize("family", CASES)
def test_the_attention_of_a_question_less_that_of_the_null_question(family):
    model, probe = model_and_probe(family, seed=2)
    got = run(QueryFocused(length=90, facts=2, samples=2), model, probe)
    want = torch.zeros(probe.layers, probe.heads, dtype=torch.float64)
    for sample in range(2):
        document = Noise().draw(probe.rng(5, sample), 90, 2)
        context = document.ids[: document.questions.min()]
        for (first, end), (told, until) in zip(document.questions.tolist(), document.facts.tolist(), strict=True):
            means = []
            for question in (document.ids[first:end], Noise.null):
                maps = eager_weights(model, probe.ids(np.concatenate([context, question]))).double()
                means.append(maps[:, :, len(context) :, told:until].mean(2))
            more = means[0] - means[1]
            want += torch.stack([torch.stack([drop_low(one) for one in row]) for row in more]) / 4
    compare(got, want, model, probe)
    assert probe.measured == {"length": 90, "questions": 4}


def test_a_question_that_is_the_null_question_scores_nothing():
    model = tiny_model(dtype=torch.float64)

    class AsksNothing(Noise):
        def draw(self, rng, length, facts=None, depth=None):
            document = super().draw(rng, length, facts, depth)
            for first, end in document.questions:
                document.ids[first:end] = self.null[: end - first]
            return document

    probe = probe_of(model)
    probe.documents = AsksNothing()
    probe.documents.null = Noise.null[:3]
    assert run(QueryFocused(length=90, facts=2), model, probe).abs().max() < 1e-15


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("chunk", [16, 33, 500])
def test_the_largest_weight_while_the_context_is_repeated(family, chunk):
    model, probe = model_and_probe(family, seed=3)
    got = run(Kvzip(length=90, chunk=chunk, samples=1), model, probe)
    document = Noise().draw(probe.rng(6, 0), 90)
    context = document.ids[: document.questions.min()].tolist()
    scored = len(context) - BEFORE
    want = torch.zeros(probe.layers, probe.heads, dtype=torch.float64)
    for first in range(1, scored, chunk):
        told = context[first : first + chunk]
        before = context[max(1, first - BEFORE) : first]
        ids = [*context, *Noise().repeat(before).tolist(), *told]
        maps = eager_weights(model, probe.ids(np.array(ids))).double()[:, :, len(context) :]
        seen = [0, *range(first, first + len(told)), *range(len(context), len(ids))]
        sinks = torch.zeros(())
        if family == "gpt_oss":  # what the sink takes of every query stays its share of the softmax
            sinks = 1 - maps.sum(-1, keepdim=True)
        maps = maps / (maps[..., seen].sum(-1, keepdim=True) + sinks)
        for j in range(first, min(first + len(told), scored)):
            want = torch.maximum(want, maps[..., j].amax(2))
    compare(got, want, model, probe)


@pytest.mark.parametrize("method", [Kvzip(length=90, chunk=40), QueryFocused(length=90, facts=2)])
def test_pieces_of_queries_change_nothing(method, monkeypatch):
    model = tiny_model(dtype=torch.float64)
    whole = run(method, model, probe_of(model))
    monkeypatch.setattr(_attention, "ENTRIES", 700)
    monkeypatch.setattr(_columns, "IN_CACHES", 700)
    monkeypatch.setattr(_columns, "FEWEST", 1)
    largest = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, *a, **k: largest.append(x.numel()) or softmax(x, *a, **k))
    pieces = run(method, model, probe_of(model))
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-14)
    assert max(largest) <= 8 * 90, "a query at a time, of all heads and keys"


def test_the_default_length_leaves_room_for_the_repetition():
    model = tiny_model()
    for longest, length in ((300, 144), (4096, 2085), (10**6, 8192)):
        probe = probe_of(model, longest=longest)
        seen = []
        probe.documents.draw = lambda rng, length, *a, seen=seen: seen.append(length) or Noise().draw(rng, 90)
        run(Kvzip(), model, probe)
        assert seen == [length] and length + min(2000, length) + 3 + BEFORE <= longest


@pytest.mark.parametrize("method", ["query_focused", "kvzip"])
def test_a_tokenizer_without_special_tokens_and_a_text_of_the_users(method, tmp_path):
    tokenizer = byte_bpe()
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
    assert tokenizer.bos_token_id is None
    model = tiny_model("qwen3", sliding=32, layers=4)
    model.resize_token_embeddings(len(tokenizer))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    scores = torch.tensor(identify(model, tokenizer, method, length=400, text=tmp_path / "text.txt").heads.scores)
    assert (scores[[1, 3]] == 0).all() and (scores[[0, 2]] != 0).all()


@pytest.mark.parametrize("kind", ["tiny", "bpe"])
def test_documents_say_where_questions_and_facts_are_and_ask_about_nothing(kind, tiny_tokenizer):
    tokenizer = tiny_tokenizer if kind == "tiny" else byte_bpe()
    documents = documents_for(tokenizer)
    made = documents.draw(np.random.default_rng(0), 1000, 3)
    decode = tokenizer.decode
    for (first, end), (told, until), answer, needle in zip(
        made.questions, made.facts, made.answers, made.needles, strict=True
    ):
        asked = decode(made.ids[first:end])
        fact = decode(made.ids[told:until])
        assert end == answer[0] and told < needle[0] and needle[-1] < until
        assert asked.replace("ask", "note") == decode(made.ids[told : needle[0]])
        assert fact.endswith("." if kind == "tiny" else "Remember it.\n")
        assert asked not in decode(documents.null) and len(documents.null) >= 4
    first = made.questions.min()
    assert (np.diff(made.answers[:, 0]) > 0).all() and first == made.questions[0, 0]
    assert decode(made.ids[first - 1 : first]) != "ask"
    before = made.ids[:4]
    assert documents.repeat(before)[-4:].tolist() == before.tolist()
    assert kind == "tiny" or decode(documents.repeat(before[:0])).strip().endswith("word by word:")


@pytest.fixture
def tiny_tokenizer():
    from transformers import AutoTokenizer

    from hf_longctx.assets import asset

    return AutoTokenizer.from_pretrained(asset("tiny-llama"))
