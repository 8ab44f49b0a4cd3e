"""Ablation: harm is measured by its definition, in rounds given what already streams, and a run goes on."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.gate_cases import RECENT, SINK, probe_of, random_model
from helpers.tiny import DenseMask, config_for

from hf_longctx import ConfigError, patched
from hf_longctx.identification.methods import ablation
from hf_longctx.identification.methods.ablation import FILE, STREAM, Ablation, Losses
from hf_longctx.identification.share import DocumentAnswers
from hf_longctx.model.modules import state_of

SMALL = {"length": 100, "questions": 4, "rounds": 2, "share": 0.5}


def counted(monkeypatch, losses=None) -> list[tuple]:
    """The sets that are measured from now on; ``losses(streaming)`` in place of the model's."""
    seen = []
    measured = Losses._measured

    def measure(self, streaming):
        seen.append(tuple(sorted(streaming)))
        return measured(self, streaming) if losses is None else losses(streaming)

    monkeypatch.setattr(Losses, "_measured", measure)
    return seen


def test_the_harm_of_a_head_is_the_loss_with_it_streaming_less_the_dense_one():
    model = random_model(dtype=torch.float64)
    probe = probe_of(model, seed=3)
    scores = Ablation(**{**SMALL, "rounds": 1}).scores(probe)
    documents = [probe.documents.draw(probe.rng(STREAM, i), 100) for i in range(probe.measured["documents"])]

    def loss(roles) -> float:
        config = state_of(model).config.override(heads={"roles": roles})
        found = []
        with patched(model, config), torch.no_grad():
            for document in documents:
                said = model(probe.ids(document.ids), use_cache=False).logits[0].log_softmax(-1)
                found += [-said[i - 1, document.ids[i]].item() for i in document.answers.ravel()]
        return sum(found) / len(found)

    dense = ["RRRR"] * 3
    want = []
    for layer in range(3):
        for head in range(4):
            roles = ["".join("S" if (i, j) == (layer, head) else "R" for j in range(4)) for i in range(3)]
            want.append(loss(roles) - loss(dense))
    got = torch.tensor(probe.measured["harm_alone"]).flatten()
    assert got.abs().max() > 1e-3, "a control: heads differ"
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=1e-5)
    by_harm = sorted(range(12), key=lambda i: want[i])
    assert scores.flatten().argsort().tolist() == by_harm
    assert (
        state_of(model).config.stores.streaming.sink == SINK
        and state_of(model).config.stores.streaming.recent == RECENT
    )


def together(streaming) -> torch.Tensor:
    """Losses of a model in which heads 0.0 and 0.1 stand in for each other, and 1.0 alone does some harm."""
    both = {(0, 0), (0, 1)} <= set(streaming)
    harm = 9.0 * both + 1.0 * ((1, 0) in streaming) + 0.01 * len(streaming)
    return torch.tensor([harm, harm + 1.0, harm + 2.0, harm + 3.0], dtype=torch.float64)


def test_heads_that_stand_in_for_each_other_are_told_by_the_rounds_after_the_first(monkeypatch):
    probe = probe_of(random_model())
    counted(monkeypatch, together)
    once = Ablation(**{**SMALL, "rounds": 1}).scores(probe)
    assert once.argmax().item() == 4 and max(once[0, 0], once[0, 1]) < once[1, 0]
    again = Ablation(**{**SMALL, "rounds": 4, "share": 0.1}).scores(probe)
    assert max(again[0, 0], again[0, 1]) == 1.0 and again[1, 0] > again[0].min()
    assert sorted(again.flatten().tolist()) == pytest.approx([i / 12 for i in range(1, 13)])


@pytest.mark.parametrize(("rounds", "share"), [(1, 0.5), (3, 0.25), (4, 0.01), (50, 0.5)])
def test_a_run_measures_as_many_settings_as_it_says(rounds, share, monkeypatch):
    probe = probe_of(random_model())
    seen = counted(monkeypatch, together)
    method = Ablation(length=100, questions=4, rounds=rounds, share=share)
    method.scores(probe)
    assert len(seen) == len(set(seen)) == 1 + method.cost(12)
    assert seen[0] == () and [len(one) for one in seen[1:13]] == [1] * 12


def test_layers_with_their_own_window_are_not_measured(monkeypatch):
    probe = probe_of(random_model())
    probe.windowed = (0, 2)
    seen = counted(monkeypatch, together)
    scores = Ablation(**SMALL).scores(probe)
    assert {layer for one in seen for layer, _ in one} == {1}
    assert (scores[[0, 2]] == 0).all() and scores[1].min() > 0


def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    model = random_model()
    want = Ablation(**SMALL).scores(probe_of(model))
    seen = counted(monkeypatch)
    saves = []
    written = ablation.written_whole

    def cut_off(path):
        saves.append(path)
        if len(saves) == 6:
            raise KeyboardInterrupt
        return written(path)

    monkeypatch.setattr(ablation, "written_whole", cut_off)
    with pytest.raises(KeyboardInterrupt):
        Ablation(**SMALL).scores(probe_of(model, work=tmp_path / "work"))
    first = seen[:5]
    assert len(json.loads((tmp_path / "work" / FILE).read_text())["losses"]) == len(first)
    del seen[:]
    got = Ablation(**SMALL).scores(probe_of(model, work=tmp_path / "work"))
    assert torch.equal(got, want) and not set(seen) & set(first)
    assert len(first) + len(seen) == 1 + Ablation(**SMALL).cost(12)
    more = Ablation(**{**SMALL, "rounds": 3})
    del seen[:]
    more.scores(probe_of(model, work=tmp_path / "work"))
    assert len(seen) == more.rounds_of(12)[-1], "more rounds go on from those that are there"


def test_the_state_of_another_run_is_refused(tmp_path):
    model = random_model()
    Ablation(**SMALL).scores(probe_of(model, work=tmp_path))
    for other, probe in (
        ("length", {}),
        ("seed", {"seed": 1}),
        ("streaming", {"sink": SINK + 1}),
    ):
        options = {**SMALL, "length": 110} if other == "length" else SMALL
        with pytest.raises(ConfigError, match=f"work: .*{FILE} is of a run with other settings: .*{other}"):
            Ablation(**options).scores(probe_of(model, work=tmp_path, **probe))
    with pytest.raises(ConfigError, match="with other settings: model"):
        Ablation(**SMALL).scores(probe_of(random_model(seed=1), work=tmp_path))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"settings": {}, "losses": {"0.0": 3}}', '{"settings": 1, "losses": 2}']
)
def test_a_file_that_is_no_state_is_refused(text, tmp_path):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ConfigError, match="is no state of an ablation run"):
        Ablation(**SMALL).scores(probe_of(random_model(), work=tmp_path))


def test_harm_within_the_noise_is_said(monkeypatch):
    probe = probe_of(random_model())
    generator = torch.Generator().manual_seed(0)
    counted(monkeypatch, lambda streaming: torch.rand(8, generator=generator, dtype=torch.float64))
    Ablation(**SMALL).scores(probe)
    assert "no head that streams alone harms the answers" in probe.doubts[0]
    assert probe.measured["heads_clearly_harmful"] == 0 and probe.measured["standard_error"] > 0.05


@pytest.mark.parametrize("right", [0, 1])
def test_a_dense_model_that_answers_nothing_is_said(right, monkeypatch, tmp_path):
    def few_right(self, model, answered=DocumentAnswers.answered):
        for number, (hits, losses) in enumerate(answered(self, model)):
            hits[:] = False
            hits[0] = number < right
            yield hits, losses

    monkeypatch.setattr(DocumentAnswers, "answered", few_right)
    for _ in range(2):  # anew, and where a file knows the losses
        probe = probe_of(random_model(), work=tmp_path)
        Ablation(**SMALL).scores(probe)
        said = [one for one in probe.doubts if "the dense model answers none of the" in one]
        assert probe.measured["dense_right"] == right and len(said) == (right == 0)
        assert all("questions right" in one and "now 100)" in one for one in said)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("streaming", [1, 2])
def test_a_loss_that_orders_nothing_is_refused_in_every_round_and_not_saved(bad, streaming, tmp_path, monkeypatch):
    def losses(heads):
        return torch.tensor([1.0, bad if len(heads) >= streaming else 2.0, 3.0, 4.0 + len(heads)], dtype=torch.float64)

    counted(monkeypatch, losses)
    with pytest.raises(ConfigError, match="the loss of an answer is nan or inf with a model in torch.float32"):
        Ablation(**SMALL).scores(probe_of(random_model(), work=tmp_path))
    saved = json.loads((tmp_path / FILE).read_text())["losses"]
    assert all(len(name.split()) < streaming for name in saved), "the sets before it are there, it is not"


def test_losses_are_those_under_an_explicit_mask_of_every_head():
    model = random_model(dtype=torch.float64)
    probe = probe_of(model)
    yardstick = DocumentAnswers(probe, 100, 2, STREAM)
    losses = Losses(probe, yardstick, {}, probe.track("ablation", 9, "settings"), None, {})
    stock = random_model(dtype=torch.float64)
    means = set()
    for streaming in ((), ((0, 1),), ((2, 3),), ((0, 1), (2, 3))):
        roles = ["".join("S" if (i, j) in streaming else "R" for j in range(4)) for i in range(3)]
        want = []
        for text in yardstick.documents:
            with DenseMask(stock, config_for(stock, roles, SINK, RECENT)), torch.no_grad():
                said = stock(probe.ids(text.ids), use_cache=False).logits[0].float().log_softmax(-1)
            want += [[-said[i - 1, text.ids[i]].item() for i in answer] for answer in text.answers]
        got = losses.of(streaming)
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64).mean(1), rtol=0, atol=1e-6)
        means.add(round(got.mean().item(), 5))
    assert len(means) == 4, "a control: every set of heads gives other losses"
