"""Ablation: a head's harm is its definition, rounds see what streams already, and a cut-off run goes on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.gate_cases import RECENT, SINK, probe_of, random_model
from helpers.tiny import DenseMask, config_for
from safetensors.torch import save_file

from hf_longctx import ConfigError
from hf_longctx.identification.methods.ablation import FILE, Ablation, shares
from hf_longctx.identification.share import ExactMatch

METHOD = Ablation(length=128, questions=1, rounds=2)


def by_layer(head: int, kv_heads: int) -> tuple[int, int]:
    return head // kv_heads, head % kv_heads


def test_the_harm_of_a_head_is_the_answers_likelihood_under_an_explicit_mask():
    model = random_model(dtype=torch.float64)
    probe = probe_of(model)
    yardstick = ExactMatch(probe, 128, 2, stream=5)
    got = {}
    for streaming in ([], [0], [3], [0, 3]):
        got[tuple(streaming)] = Ablation.harm(probe, yardstick, streaming)
        roles = [["R"] * probe.kv_heads for _ in range(probe.layers)]
        for layer, head in (by_layer(one, probe.kv_heads) for one in streaming):
            roles[layer][head] = "S"
        stock = random_model(dtype=torch.float64)
        losses = []
        for text in yardstick.texts:
            with DenseMask(stock, config_for(stock, ["".join(row) for row in roles], SINK, RECENT)), torch.no_grad():
                logits = stock(probe.ids(text.ids), use_cache=False).logits[0].float()
            for answer in text.answers:
                losses += (-logits.log_softmax(-1))[answer - 1, text.ids[answer]].tolist()
        assert got[tuple(streaming)] == pytest.approx(np.mean(losses), abs=1e-6)
    assert len(set(got.values())) == 4, "a control: every set of heads does another harm"


def test_shares_are_as_equal_as_may_be():
    assert shares(90, 3) == [30, 30, 30]
    assert shares(10, 3) == [3, 3, 4]
    assert shares(2, 5) == [1, 1]
    assert all(sum(shares(n, r)) == n for n in range(1, 30) for r in range(1, 30))


@pytest.mark.parametrize(("rounds", "last"), [(1, {2, 3}), (2, {1, 3})])
def test_rounds_see_what_already_streams(monkeypatch, rounds, last):
    """Heads 0 and 1 stand in for each other, so alone neither does harm: only a second round tells one is needed."""
    alone = {0: 0.0, 1: 0.1, 2: 0.2, 3: 0.3}

    def harm(probe, yardstick, streaming):
        return sum(alone[head] for head in streaming if head < 4) + (5 if {0, 1} <= set(streaming) else 0)

    probe = probe_of(random_model())
    monkeypatch.setattr(Ablation, "harm", staticmethod(harm))
    monkeypatch.setattr(Ablation, "layers", staticmethod(lambda probe: [0, 1]))
    probe.kv_heads = 2
    # Of four heads two stay after the first of two rounds; with four rounds the greedy order is complete.
    scores = Ablation(length=128, questions=1, rounds=4 if rounds == 2 else 1).scores(probe).flatten()
    assert sorted(scores[:4].tolist()) == [0.25, 0.5, 0.75, 1.0]
    assert set(scores[:4].argsort(descending=True)[:2].tolist()) == last


def test_layers_without_roles_are_neither_measured_nor_ordered(monkeypatch):
    asked = []
    harm = Ablation.harm
    monkeypatch.setattr(Ablation, "harm", staticmethod(lambda p, y, heads: asked.append(heads) or harm(p, y, heads)))
    probe = probe_of(random_model())
    probe.windowed = (1,)
    scores = METHOD.scores(probe)
    assert (scores[1] == 0).all() and (np.delete(scores.numpy(), 1, axis=0) > 0).all()
    assert {head // probe.kv_heads for heads in asked for head in heads} == set(range(probe.layers)) - {1}
    assert probe.measured["nll_alone"][1] == [None] * probe.kv_heads


def test_documents_that_fit_the_window_are_refused():
    with pytest.raises(
        ConfigError, match=rf"length: got 90 tokens, all of which a streaming head reads \(66 \+ {RECENT}\)"
    ):
        Ablation(length=90, questions=1).scores(probe_of(random_model(), sink=90 - RECENT))
    Ablation(length=91, questions=1, rounds=1).scores(probe_of(random_model(), sink=90 - RECENT))


def test_a_model_without_a_likelihood_is_refused():
    model = random_model()
    probe = probe_of(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ConfigError, match="likelihood is nan or inf with a model in torch.float32"):
        METHOD.scores(probe)


def cut_off(monkeypatch, work, after: int) -> None:
    with monkeypatch.context() as patch:
        harm, count = Ablation.harm, iter(range(after))

        def stopping(*given):
            if next(count, None) is None:
                raise KeyboardInterrupt
            return harm(*given)

        patch.setattr(Ablation, "harm", staticmethod(stopping))
        with pytest.raises(KeyboardInterrupt):
            METHOD.scores(probe_of(random_model(), work=work))


def test_a_run_that_was_cut_off_goes_on_where_it_was(monkeypatch, tmp_path):
    whole = probe_of(random_model())
    want = METHOD.scores(whole)
    heads = whole.layers * whole.kv_heads
    cut_off(monkeypatch, tmp_path, after=heads + 1)  # one head into the second round
    harm, asked = Ablation.harm, []
    monkeypatch.setattr(Ablation, "harm", staticmethod(lambda *given: asked.append(1) or harm(*given)))
    resumed = probe_of(random_model(), work=tmp_path)
    assert torch.equal(METHOD.scores(resumed), want) and resumed.measured == whole.measured
    assert len(asked) == heads - heads // 2 - 1
    asked.clear()
    assert torch.equal(METHOD.scores(probe_of(random_model(), work=tmp_path)), want)
    assert not asked, "a finished run is read back"


def test_a_state_of_another_run_is_refused(monkeypatch, tmp_path):
    cut_off(monkeypatch, tmp_path, after=1)
    others = {
        "rounds": (Ablation(length=128, questions=1, rounds=3), {}),
        "questions": (Ablation(length=128, questions=2, rounds=2), {}),
        "length": (Ablation(length=140, questions=1, rounds=2), {}),
        "seed": (METHOD, {"seed": 1}),
        "streaming": (METHOD, {"sink": SINK + 1}),
    }
    for name, (method, changed) in others.items():
        with pytest.raises(ConfigError, match=rf"{FILE} is of a run with other settings: .*{name} \(was "):
            method.scores(probe_of(random_model(), work=tmp_path, **changed))
    save_file({"x": torch.ones(1)}, tmp_path / FILE, {"settings": "{}"})
    with pytest.raises(ConfigError, match=f"{FILE} is no state of a ablation run"):
        METHOD.scores(probe_of(random_model(), work=tmp_path))
