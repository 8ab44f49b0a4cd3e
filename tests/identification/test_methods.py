"""Each method's score equals its definition, written here over Transformers' own eager attention matrices."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers.every_family import Case
from helpers.every_family import tiny_model as random_model
from helpers.method_cases import Noise, eager_weights, group_max, probe_of, run
from helpers.tiny import FAMILIES, config_for, tiny_model
from helpers.tiny_tokenizer import byte_bpe
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hf_longctx import ConfigError, UnsupportedModelError, observe, patch_model, patched
from hf_longctx.assets import asset
from hf_longctx.identification import share as _share
from hf_longctx.identification.methods import retrieval_score
from hf_longctx.identification.methods.echo_induction import EchoInduction, union_order
from hf_longctx.identification.methods.retrieval_score import RetrievalScore, copies
from hf_longctx.identification.methods.two_needle import TwoNeedle
from hf_longctx.layout.scores import Scores
from hf_longctx.model import attention_mass as _attention
from hf_longctx.model.attention_mass import weights
from hf_longctx.tasks.documents import documents_for
from hf_longctx.tasks.forced import forced_answers
from hf_longctx.tasks.haystack import TextHaystack

# The weights.


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize(("new", "total"), [(1, 1), (1, 9), (5, 9), (9, 9), (63, 130)])
@pytest.mark.parametrize("entries", [1, 500, 2**24])
def test_weights_by_pieces_are_the_causal_softmax(monkeypatch, group, new, total, entries):
    monkeypatch.setattr(_attention, "ENTRIES", entries)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2 * group, new, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(1, 2, total, 8, generator=generator, dtype=torch.float64)
    scores = q[0] @ k[0].repeat_interleave(group, 0).transpose(1, 2) * 0.3
    hidden = torch.arange(total) > torch.arange(total - new, total)[:, None]
    want = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    pieces = list(weights(q, k, Scores(0.3), torch.arange(total - new, total)))
    assert torch.cat([at for at, _ in pieces]).tolist() == list(range(total - new, total))
    got = torch.cat([piece for _, piece in pieces], 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    assert all(piece.numel() <= max(entries, 2 * group * total) for _, piece in pieces)
    some = torch.arange(total - new, total)[::2]
    got = torch.cat([piece for _, piece in weights(q, k, Scores(0.3), some)], 1)
    torch.testing.assert_close(got, want[:, ::2], rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
def test_weights_of_observed_layers_make_their_outputs(kind):
    """With softcap and sinks as well; without them they make another output, which is the control."""
    model = random_model(Case(kind, True))
    patch_model(model, config_for(model, "retrieval"))
    errors, controls = [], []

    def look(layer_idx, q, k, v, scaling, rows, compute):
        want, group = compute("retrieval")[0], q.shape[1] // k.shape[1]
        for scores, found in ((compute.scores, errors), (Scores(scaling), controls)):
            made = torch.cat([w for _, w in weights(q, k, scores, torch.arange(q.shape[2]))], 1)
            found.append((made @ v[0].repeat_interleave(group, 0) - want).abs().max().item())

    with observe(model, look), torch.no_grad():
        model(torch.randint(3, 97, (1, 9)), use_cache=False)  # as long as the windows
    assert len(errors) == model.config.num_hidden_layers and max(errors) < 1e-12
    assert max(controls) == max(errors) if kind == "llama" else min(controls) > 1e-6


# Echo and induction.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("copies_", [2, 3])
def test_echo_and_induction_are_their_definitions(family, copies_):
    model = tiny_model(family, dtype=torch.float64)
    probe = probe_of(model, seed=4)
    n = 13
    scores = run(EchoInduction(tokens=n, copies=copies_), model, probe)
    ids = probe.ids(np.tile(Noise().noise(probe.rng(1), n), copies_))
    maps = eager_weights(model, ids)
    echo, induction = torch.zeros(2, 3, 8, dtype=torch.float64)
    for layer in range(3):
        for head in range(8):
            for i in range(n, n * copies_):
                for j in range(i % n, i, n):
                    echo[layer, head] += maps[layer, head, i, j]
                    induction[layer, head] += maps[layer, head, i, j + 1]
    asked = n * (copies_ - 1)
    want_echo, want_induction = group_max(echo / asked, model), group_max(induction / asked, model)
    got = [torch.tensor(probe.measured[name], dtype=torch.float64) for name in ("echo", "induction")]
    torch.testing.assert_close(got[0], want_echo, rtol=0, atol=6e-5)  # written with 4 decimals
    torch.testing.assert_close(got[1], want_induction, rtol=0, atol=6e-5)
    assert not torch.allclose(got[0], want_induction, rtol=0, atol=6e-5), "a control"
    assert torch.equal(scores, union_order(want_echo, want_induction, 14.0))


def test_the_best_heads_are_the_papers_union_for_every_share():
    generator = torch.Generator().manual_seed(1)
    echo, induction = torch.rand(2, 10, 10, generator=generator, dtype=torch.float64)
    scores = union_order(echo, induction, 14.0).flatten()
    assert len(set(scores.tolist())) == 100 and scores.min() > 0 and scores.max() == 1
    for percent in (1, 2, 3):
        union = {
            *echo.flatten().topk(percent).indices.tolist(),
            *induction.flatten().topk(14 * percent).indices.tolist(),
        }
        assert set(scores.topk(len(union)).indices.tolist()) == union
    assert set(union_order(echo, induction, 1e-9).flatten().topk(5).indices.tolist()) == set(
        echo.flatten().topk(5).indices.tolist()
    )


def test_heads_that_enter_together_come_by_the_sum_of_their_scores():
    echo, induction = torch.tensor([[0.0, 0.2, 0.1]]), torch.tensor([[0.5, 0.0, 0.0]])
    # With one head by each score at a time the best of either enters first, the one with the larger sum before.
    assert union_order(echo, induction, 1.0).flatten().argsort(descending=True).tolist() == [0, 1, 2]
    assert union_order(2 * echo, induction / 5, 1.0).flatten().argsort(descending=True).tolist() == [1, 0, 2]


def test_no_matrix_of_all_queries_and_keys_is_kept(monkeypatch):
    monkeypatch.setattr(_attention, "ENTRIES", 4096)
    model, largest = tiny_model(), []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, *a, **k: largest.append(x.numel()) or softmax(x, *a, **k))
    run(EchoInduction(tokens=100, copies=4), model, probe_of(model))
    assert len(largest) > 3 and max(largest) <= 4096 < 8 * 400 * 400


def test_more_than_the_model_was_made_for_is_warned_of_and_the_default_is_made_to_fit(caplog):
    model = tiny_model()
    probe = probe_of(model, longest=200)
    run(EchoInduction(), model, probe)
    assert probe.measured["tokens"] == 50 and "made for" not in caplog.text
    run(EchoInduction(tokens=100), model, probe)
    assert probe.measured["tokens"] == 100 and "400 tokens are more than the 200 the model was made for" in caplog.text
    with pytest.raises(ConfigError, match="copies: got 101, but the model was made for 200 tokens"):
        run(EchoInduction(copies=101), model, probe)


def test_layers_with_their_own_window_are_left_out_of_the_union():
    model = tiny_model(dtype=torch.float64)
    free, windowed = probe_of(model), probe_of(model, windowed=(1,))
    run(EchoInduction(tokens=20), model, free)
    scores = run(EchoInduction(tokens=20), model, windowed)
    echo, induction = (torch.tensor(free.measured[name], dtype=torch.float64) for name in ("echo", "induction"))
    echo[1] = induction[1] = 0
    assert torch.equal(torch.tensor(windowed.measured["echo"], dtype=torch.float64), echo)
    assert scores[1].max() < scores[[0, 2]].min()


# Two needles.


@pytest.mark.parametrize("family", FAMILIES)
def test_two_needle_mass_is_its_definition(family):
    model = tiny_model(family, dtype=torch.float64)
    probe = probe_of(model, seed=2)
    got = run(TwoNeedle(length=90, facts=2, samples=2), model, probe)
    mass = torch.zeros(3, 8, dtype=torch.float64)
    for sample in range(2):
        document = Noise().draw(probe.rng(2, sample), 90, 2, 0.05)
        maps = eager_weights(model, probe.ids(document.ids))
        for i in document.answers.ravel():
            for j in range(document.needles[0, 0], document.needles[-1, -1] + 1):
                mass += maps[:, :, i - 1, j] / document.answers.size / 2
    # Transformers' eager softmax is float32 whatever the model is.
    torch.testing.assert_close(got, group_max(mass, model), rtol=0, atol=1e-6)
    assert not torch.allclose(got, group_max(mass.flip(1), model), rtol=0, atol=1e-5), "a control"


# Retrieval score.


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mistral"])  # the heads of tiny-qwen3 copy nothing
def test_copied_tokens_are_counted_by_the_definition(name):
    model = AutoModelForCausalLM.from_pretrained(asset(name), dtype=torch.float64).eval()
    probe = probe_of(model)
    probe.documents = documents_for(AutoTokenizer.from_pretrained(asset(name)))
    for seed in range(2):
        document = probe.documents.draw(np.random.default_rng(seed), 150, 2)
        with patched(model, config_for(model, "retrieval")):
            right, got = copies(probe, document)
        want_right, want = slow_copies(model, probe, document)
        assert right == want_right == 1.0
        assert (want > 0.5).any(), "no head copied anything: the comparison would prove nothing"
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        # Asked for something else the model says the same, and its heads copy the same: what counts is what it says.
        ids = document.ids.copy()
        ids[document.answers[0, :2]] += 1
        with patched(model, config_for(model, "retrieval")):
            right, got = copies(probe, dataclasses.replace(document, ids=ids))
        assert right == 0.5
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def greedy(model, ids: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[:, -count:]


def slow_copies(model, probe, document) -> tuple[float, torch.Tensor]:
    first, needle = int(document.answers[0, 0]), document.needles[0].tolist()
    ids = probe.ids(document.ids[:first])
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    copied = {(layer, head): set() for layer in range(layers) for head in range(heads)}
    right = 0
    for expected in document.ids[document.answers[0]]:
        said = int(greedy(model, ids, 1))
        maps = eager_weights(model, ids)
        for layer, head in copied:
            top = int(maps[layer, head, -1].argmax())
            if top in needle and int(document.ids[top]) == said:
                copied[layer, head].add(top)
        right += said == expected
        ids = torch.cat([ids, torch.tensor([[said]])], 1)
    shares = [[len(copied[layer, head]) / len(needle) for head in range(heads)] for layer in range(layers)]
    return right / len(needle), torch.tensor(shares, dtype=torch.float64)


def test_a_model_that_finds_nothing_is_said_to_find_nothing():
    model = tiny_model()
    with pytest.raises(UnsupportedModelError, match="found the needle in none of 4 documents"):
        run(RetrievalScore(shortest=64, longest=96, lengths=2, depths=2), model, probe_of(model))


def test_runs_the_model_gets_wrong_are_left_out(monkeypatch):
    seen = iter([(0.4, torch.ones(3, 8)), (0.5, torch.full((3, 8), 0.25)), (1.0, torch.full((3, 8), 0.75))])
    monkeypatch.setattr(retrieval_score, "copies", lambda probe, document: next(seen))
    model = tiny_model()
    probe = probe_of(model)
    scores = RetrievalScore(shortest=64, longest=64, lengths=1, depths=3).scores(probe)
    assert (scores == 0.5).all() and probe.measured["runs_answered"] == 2


def test_lengths_are_those_asked_for():
    probe = probe_of(tiny_model(), longest=3000)
    assert RetrievalScore().all_lengths(probe) == [1024, 1518, 2012, 2506, 3000]
    assert RetrievalScore(shortest=256, longest=1024, lengths=1).all_lengths(probe) == [1024]
    assert RetrievalScore(longest=512, lengths=2).all_lengths(probe) == [512, 512]
    with pytest.raises(ConfigError, match="shortest: got 1024 tokens, more than"):
        RetrievalScore(shortest=1024, longest=512).all_lengths(probe)


# The share.


@pytest.mark.parametrize("needed", range(17))
def test_bisection_finds_the_smallest_number_in_few_measurements(needed):
    asked = []

    def measure(heads: int) -> dict[str, float]:
        asked.append(heads)
        return {"exact_match": 0.9 if heads >= needed else 0.85}

    found, curve = _share.bisect(range(17), {"exact_match": 0.9}, measure, drop, 0.01)
    assert found == needed and len(asked) == len(set(asked)) <= 5 and 16 not in asked
    assert [row["retrieval_heads"] for row in curve] == sorted([16, *asked], reverse=True)
    assert {row["drop"] for row in curve} <= {0.0, 0.05}


def drop(dense, patched) -> float:
    return dense["exact_match"] - patched["exact_match"]


@pytest.mark.parametrize(("dense", "at_8", "target"), [(0.8, 0.7, 0.1), (0.9, 0.89, 0.01), (0.3, 0.2, 0.1)])
def test_the_target_is_inclusive(dense, at_8, target):
    quality = {8: at_8, 4: at_8 - 0.001}
    found, _ = _share.bisect([4, 8, 16], {"exact_match": dense}, lambda n: {"exact_match": quality[n]}, drop, target)
    assert found == 8


def test_a_model_that_answers_nothing_is_refused_before_anything_else():
    with pytest.raises(ConfigError, match="answers none of the questions"):
        _share.ShareSearch(probe_of(tiny_model()), 60, 0.1)


def test_exact_match_counts_whole_answers():
    model = tiny_model(dtype=torch.float64)
    probe = probe_of(model)
    yardstick = _share.DocumentAnswers(probe, 60, 4, 8)
    assert sum(len(text.answers) for text in yardstick.documents) == 4
    hits, losses = [], []
    with torch.no_grad():
        for text in yardstick.documents:
            logits = model(probe.ids(text.ids), use_cache=False).logits[0]
            for answer in text.answers:
                said = logits[answer - 1].argmax(-1)
                hits.append(bool((said.numpy() == text.ids[answer]).all()))
                losses += (-logits.log_softmax(-1))[answer - 1, text.ids[answer]].tolist()
    want = {"exact_match": round(np.mean(hits), 4), "nll": round(np.mean(losses), 4)}
    assert yardstick.measure(model) == pytest.approx(want, abs=1e-4)


def test_models_that_read_text_are_judged_by_tasks_in_plain_english(tmp_path):
    """With their chat template and the user's text, if any; not by passkeys, which small ones cannot copy."""
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=800, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    tokenizer = byte_bpe()
    (tmp_path / "text.txt").write_text("Quiet hills. " * 200)
    for text, template in ((None, None), (tmp_path, "{% for m in messages %}<|chat|>{{ m.content }}\n{% endfor %}")):
        tokenizer.chat_template = template
        probe = dataclasses.replace(probe_of(model), documents=documents_for(tokenizer, text))
        yardstick = _share.answers(probe, 1500, 10)
        assert [len(sample.questions) for sample in yardstick.samples] == [8, 8]
        for sample, words in zip(yardstick.samples, ("Codes are hidden", "some of the people"), strict=True):
            said = tokenizer.decode(sample.context)
            assert sample.length == 1500 and words in said and said.startswith("<|chat|>") == bool(template)
            assert ("Quiet hills" in said) == bool(text)
        found = list(yardstick.answered(model))
        want = [[one.nll / one.tokens for one in forced_answers(model, sample)] for sample in yardstick.samples]
        assert [losses.tolist() for _, losses in found] == want
        quality = yardstick.measure(model)
        assert quality == {"exact_match": 0.0, "nll": round(float(np.mean(want)), 4)}
        other = _share.answers(probe, 1500, 10, stream=11)
        assert not np.array_equal(other.texts[0], yardstick.texts[0]), "other streams have other texts"


def test_agreement_and_perplexity_are_against_the_first_model_measured(tmp_path):
    model = tiny_model(dtype=torch.float64)
    probe = probe_of(model)
    text = TextHaystack(np.random.default_rng(0).integers(3, 97, 5000))
    yardstick = _share.NextToken(probe, text, 300, 2)
    dense = yardstick.measure(model)
    assert dense["agreement"] == 1.0 and yardstick.drop(dense, dense) == 0
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(probe.ids(p)).logits[0, :-1], torch.from_numpy(p[1:])).item()
            for p in yardstick.pieces
        ]
    assert dense["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    with patched(model, config_for(model, "streaming", sink=1, recent=2)):
        worse = yardstick.measure(model)
    assert worse["agreement"] < 1 and yardstick.drop(dense, worse) >= 1 - worse["agreement"] > 0
    assert yardstick.drop(dense, {"agreement": 1.0, "perplexity": 2 * dense["perplexity"]}) == 0.5
    assert yardstick.drop(dense, {"agreement": 1.0, "perplexity": float("nan")}) == 1.0
    with pytest.raises(ConfigError, match="it has 5000 tokens, fewer than a piece"):
        _share.NextToken(probe, text, 5001, 1)


def test_documents_of_a_real_tokenizer_reach_the_methods():
    tokenizer = byte_bpe()
    model = tiny_model("qwen3")
    model.resize_token_embeddings(len(tokenizer))
    probe = probe_of(model)
    probe.documents = documents_for(tokenizer)
    assert run(TwoNeedle(length=400), model, probe).shape == (3, 4)
    assert run(EchoInduction(tokens=50), model, probe).shape == (3, 4)
