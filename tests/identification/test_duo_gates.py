"""Gates: their gradient, what training leaves behind, going on from a saved state, and the heads they find."""

from __future__ import annotations

import dataclasses
import types
from datetime import timedelta
from itertools import product

import accelerate
import pytest
import torch
from helpers.gate_cases import RECENT, SHORT, SINK, probe_of, random_model
from helpers.tiny import FAMILIES, DenseMask, config_for
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longctx import (
    ConfigError,
    LongCtxConfig,
    UnsupportedModeError,
    UnsupportedModelError,
    observe,
    patch_model,
    unpatch_model,
)
from hf_longctx.assets import asset
from hf_longctx.config.words import build
from hf_longctx.identification import gates as _gates
from hf_longctx.identification.methods.base import HeadProbe
from hf_longctx.identification.methods.duo_gates import FILE, DuoGates
from hf_longctx.tasks.documents import documents_for

LENGTH = 61
PLACES = torch.tensor([37, 40, 59, 60])


def in_float64(model):
    """Transformers' norms compute in float32, which no finite difference survives."""

    def norm(self, states):
        eps = getattr(self, "variance_epsilon", None)
        return self.weight * states * (states.square().mean(-1, keepdim=True) + eps).rsqrt()

    count = 0
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(norm, module)
            count += 1
    assert count >= 2 * model.config.num_hidden_layers + 1
    return model


class DoublePath(DenseMask):
    """A stock model that computes both roles of every head under explicit masks, and mixes them."""

    def __init__(self, model, config, gates):
        super().__init__(model, config)
        self.gates = gates

    def attend(self, module, q, k, v, mask, **kwargs):
        outs = []
        for role in "RS":
            self.roles = [role * k.shape[1]] * len(self.gates)
            outs.append(super().attend(module, q, k, v, mask, **kwargs)[0])  # [B, T, H, D]
        group = q.shape[1] // k.shape[1]
        gate = torch.stack([self.gates[module.layer_idx][head // group] for head in range(q.shape[1])])[:, None]
        return outs[1] + gate * (outs[0] - outs[1]), None


def some_gates(model) -> torch.Tensor:
    torch.manual_seed(5)
    shape = model.config.num_hidden_layers, model.config.num_key_value_heads
    return torch.rand(shape, dtype=torch.float64, requires_grad=True)


def reference_gradient(model, ids, gates, recent: int = RECENT) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        plain = model.base_model(ids, use_cache=False).last_hidden_state[0, PLACES]
    with DoublePath(model, config_for(model, "retrieval", SINK, recent), gates):
        mixed = model.base_model(ids, use_cache=False).last_hidden_state[0, PLACES]
    loss = ((mixed - plain) ** 2).sum() / plain.numel()
    return loss.detach(), torch.autograd.grad(loss, gates)[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "group"), [*((family, 2) for family in FAMILIES), ("llama", 1), ("llama", 3)])
def test_gradient_equals_a_dense_double_path(family, group, checkpointing):
    model = in_float64(random_model(family, torch.float64, group=group))
    ids = torch.randint(3, 190, (1, LENGTH))
    gates = some_gates(model)
    want, right = reference_gradient(model, ids, gates)
    _, wrong = reference_gradient(model, ids, gates, RECENT - 1)
    probe_of(model)
    with _gates.frozen(model, checkpointing):
        loss = _gates.distance(model, gates, ids, PLACES)
        (got,) = torch.autograd.grad(loss, gates)
    torch.testing.assert_close(loss.detach(), want, rtol=1e-9, atol=0)
    torch.testing.assert_close(got, right, rtol=1e-7, atol=1e-12)
    assert right.abs().min() > 1e-7, "every gate must matter"
    assert (wrong - right).abs().max() > 1e-3 * right.abs().max(), "a control: one key less is another gradient"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_equals_finite_differences(checkpointing):
    model = in_float64(random_model("llama", torch.float64))
    ids, gates = torch.randint(3, 190, (1, LENGTH)), some_gates(model)
    probe_of(model)
    with _gates.frozen(model, checkpointing):
        (got,) = torch.autograd.grad(_gates.distance(model, gates, ids, PLACES), gates)
        numeric, eps = torch.empty_like(got), 1e-5
        for place in product(*map(range, gates.shape)):
            ends = []
            for sign in (1, -1):
                moved = gates.detach().clone()
                moved[place] += sign * eps
                with torch.no_grad():
                    ends.append(_gates.distance(model, moved, ids, PLACES))
            numeric[place] = (ends[0] - ends[1]) / (2 * eps)
    torch.testing.assert_close(got, numeric, rtol=1e-6, atol=1e-11)


def test_checkpointed_layers_compute_twice_and_others_once():
    probe = probe_of(random_model())
    ids, gates, seen = torch.randint(3, 190, (1, LENGTH)), torch.ones(3, 4, requires_grad=True), {}
    for checkpointing in (False, True):
        calls = []
        mix = _gates.gated(gates)

        def count(layer_idx, *args):
            calls.append(layer_idx)  # noqa: B023 - runs inside this iteration
            return mix(layer_idx, *args)  # noqa: B023

        with _gates.frozen(probe.model, checkpointing), observe(probe.model, count):
            hidden = probe.model.base_model(ids, use_cache=False).last_hidden_state
            torch.autograd.grad(hidden.square().sum(), gates)
        seen[checkpointing] = calls
    assert seen == {False: [0, 1, 2], True: [0, 1, 2, 2, 1, 0]}


# What is left behind.


def everything(model) -> list:
    modules = [(type(module), *(vars(module).get(flag, "none") for flag in FLAGS)) for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return [modules, hooks, [weight.requires_grad for weight in model.parameters()], model.config.to_dict()]


FLAGS = ("training", *_gates.FLAGS)


@pytest.mark.parametrize("way", ["returns", "raises"])
def test_the_model_is_left_as_it_was(way):
    model = random_model()
    model.base_model.layers[1].train()
    model.base_model.layers[2].gradient_checkpointing = True
    model.lm_head.requires_grad_(False)
    probe = probe_of(model)
    before = everything(model)
    assert any(before[2]) and not all(before[2])

    def run():
        with _gates.frozen(model, True):
            assert everything(model)[:1] + everything(model)[2:3] != before[:1] + before[2:3], "a control"
            assert not any(weight.requires_grad for weight in model.parameters())
            if way == "raises":
                raise RuntimeError

    if way == "raises":
        with pytest.raises(RuntimeError):
            run()
    else:
        run()
        with torch.no_grad():
            DuoGates(**{**SHORT, "steps": 2}).scores(probe)
    assert everything(model) == before


def test_dropout_does_not_run():
    want = DuoGates(**SHORT).scores(probe_of(random_model()))
    dropping = random_model(attention_dropout=0.5)
    probe = probe_of(dropping)
    for layer in dropping.base_model.layers:
        layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj, torch.nn.Dropout(0.5))
    dropping.train()
    assert torch.equal(DuoGates(**SHORT).scores(probe), want)
    assert dropping.training
    assert not torch.equal(DuoGates(**SHORT).scores(probe_of(random_model(seed=1))), want), "a control"


def test_layers_that_cannot_checkpoint_are_refused():
    model = random_model()
    model.base_model.layers = torch.nn.ModuleList()
    with pytest.raises(UnsupportedModelError, match="gradient_checkpointing=False"), _gates.frozen(model, True):
        pass
    with _gates.frozen(model, False):
        pass


# The training.


@pytest.mark.slow
def test_the_gates_find_the_heads_that_an_ablation_found():
    path = asset("tiny-llama")
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    stores = {"streaming": {"store": "sink_recent", "sink": 4, "recent": 64}}
    roles = {"roles": ["RRRR"] * 4}
    patch_model(model, {"model": LongCtxConfig.describe(model.config), "heads": roles, "stores": stores})
    documents = documents_for(AutoTokenizer.from_pretrained(path))
    probe = HeadProbe(model, layers=4, heads=8, kv_heads=4, documents=documents, longest=4096)
    scores = DuoGates(steps=60, length=512, gradient_checkpointing=False).scores(probe)
    found, others = scores[1], scores[[0, 2, 3]]
    assert scores.dtype == torch.float64 and scores.shape == (4, 4)
    assert found.min() > 0.95 and found.min() > others.max() + 0.02
    assert (others < 0.2).sum() >= 7, "heads that nothing needs must close"
    told = probe.measured
    assert told["lengths"] == [256, 512] and told["documents"] == 60
    assert told["mean_gate"] == round(scores.mean().item(), 4)
    assert told["regularisation_loss"] == round(0.05 * scores.mean().item(), 6)
    assert 0 < told["distillation_loss"] < 0.02


def test_gates_fall_only_under_the_regulariser():
    free = DuoGates(**SHORT, reg_weight=0.0).scores(probe_of(random_model(dtype=torch.float64)))
    torch.testing.assert_close(free, torch.ones_like(free), rtol=0, atol=1e-3)
    pressed = DuoGates(**SHORT, reg_weight=1e4).scores(probe_of(random_model(dtype=torch.float64)))
    warm = sum(DuoGates(**SHORT).warmth(step) for step in range(8))
    torch.testing.assert_close(pressed, torch.full_like(pressed, 1 - 0.02 * warm), rtol=0, atol=1e-3)
    closed = DuoGates(**{**SHORT, "steps": 40}, lr=0.5, reg_weight=1e4).scores(probe_of(random_model()))
    assert (closed == 0).all()


def test_gradient_checkpointing_changes_nothing():
    got = [DuoGates(**SHORT, gradient_checkpointing=on).scores(probe_of(random_model())) for on in (True, False)]
    assert torch.equal(*got) and got[0].min() < 0.95


def test_gates_of_a_bfloat16_model_are_float32():
    probe = probe_of(random_model(dtype=torch.bfloat16))
    scores = DuoGates(**SHORT).scores(probe)
    assert torch.equal(scores.float().double(), scores) and not torch.equal(scores.bfloat16().double(), scores)
    assert all(weight.dtype == torch.bfloat16 for weight in probe.model.parameters())


def test_a_loss_that_is_no_number_stops_the_run():
    model = random_model()
    with torch.no_grad():
        model.base_model.layers[1].mlp.up_proj.weight.fill_(float("inf"))
    with pytest.raises(ConfigError, match="step 0 is nan or inf.*torch.float32"):
        DuoGates(**SHORT).scores(probe_of(model))


def test_warm_up_and_decay():
    gates = DuoGates()
    steps = (0, 39, 199, 399, 1000, 1600, 1800, 1999)
    assert [gates.warmth(step) for step in steps] == [0.1, 0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.1]
    assert [DuoGates(steps=1).warmth(0), DuoGates(steps=3).warmth(2)] == [1.0, 1.0]


def test_documents_depend_on_the_seed_and_the_step_alone():
    def draw(seed: int, step: int, index: int):
        return DuoGates(**SHORT).document(probe_of(random_model(), seed), step, index, (60, 120)).ids.tolist()

    first = draw(0, 1, 0)
    assert first == draw(0, 1, 0)
    others = [draw(0, 1, 1), draw(0, 2, 0), draw(1, 1, 0)]
    assert first not in others and len(first) == len(others[0])
    lengths = {len(draw(0, step, 0)) for step in range(12)}
    assert len(lengths) > 6 and min(lengths) >= 60 and max(lengths) <= 120


def test_lengths(caplog):
    probe = probe_of(random_model())
    probe.longest = 4096
    assert DuoGates().lengths(probe) == (1024, 4096)
    assert DuoGates(length=600).lengths(probe) == (300, 600)
    assert DuoGates(length=600, min_length=600).lengths(probe) == (600, 600)
    probe.longest = 10**6
    assert DuoGates().lengths(probe) == (1024, 32768)
    with pytest.raises(ConfigError, match="^min_length: got 700 tokens.*600"):
        DuoGates(length=600, min_length=700).lengths(probe)
    assert DuoGates(length=2 * 10**6).lengths(probe) == (1024, 2 * 10**6)
    assert "length: 2000000 tokens are more than the 1000000" in caplog.text


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"lr": 0.0}, {"reg_weight": -1.0}, {"checkpoint_every": 0}, {"rate": 1}]
)
def test_options_have_bounds(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        build("identification.methods", {"method": "duo_gates", **wrong}, "method", "identify")


# Going on.


class StopsAt(HeadProbe):
    """Its run is cut off before step 5, and it counts the steps that it saw."""

    stop = 5

    def track(self, label, total, unit, done=0, shown=True):
        self.seen = []
        bar = super().track(label, total, unit, done, shown)
        counted = bar.advance

        def advance(saved=False):
            counted(saved=saved)
            self.told = [bar.done, bar.saved, bar.total]
            self.seen = list(range(done, bar.done))
            if bar.done == self.stop:
                raise KeyboardInterrupt

        bar.advance = advance
        return bar


class Counts(StopsAt):
    stop = -1


METHOD = DuoGates(**SHORT, checkpoint_every=3)


def cut_off(work, **kwargs) -> None:
    with pytest.raises(KeyboardInterrupt):
        METHOD.scores(probe_of(random_model(), work=work, cls=StopsAt, **kwargs))


def test_a_run_that_was_cut_off_goes_on_bit_for_bit(tmp_path):
    whole = probe_of(random_model())
    want = METHOD.scores(whole)
    work = tmp_path / "new" / "folder"
    cut_off(work)
    assert len(load_file(work / FILE)["losses"]) == 3
    resumed = probe_of(random_model(), work=work, cls=Counts)
    assert torch.equal(METHOD.scores(resumed), want)
    assert resumed.seen == [3, 4, 5, 6, 7] and resumed.measured == whole.measured
    again = probe_of(random_model(), work=work, cls=Counts)
    assert torch.equal(METHOD.scores(again), want) and again.seen == [], "a finished run is read back"
    assert sorted(path.name for path in work.iterdir()) == [FILE]


def test_what_is_saved_matters(tmp_path):
    want = METHOD.scores(probe_of(random_model()))
    for name in ("gates", "exp_avg", "exp_avg_sq"):
        work = tmp_path / name
        cut_off(work)
        with safe_open(work / FILE, "pt") as file:
            metadata = file.metadata()
        state = load_file(work / FILE)
        save_file({**state, name: state[name] * 0.9}, work / FILE, metadata)
        assert not torch.equal(METHOD.scores(probe_of(random_model(), work=work)), want), name


def test_a_state_survives_another_way_to_run_it(tmp_path):
    cut_off(tmp_path)
    method = dataclasses.replace(METHOD, gradient_checkpointing=False, checkpoint_every=100)
    resumed = probe_of(random_model(), work=tmp_path, cls=Counts)
    assert torch.equal(method.scores(resumed), METHOD.scores(probe_of(random_model())))
    assert resumed.seen[0] == 3


@pytest.mark.parametrize("what", ["steps", "lr", "reg_weight", "lengths", "facts", "documents_per_step"])
def test_a_state_of_other_options_is_refused(what, tmp_path):
    cut_off(tmp_path)
    other = {"steps": 9, "lr": 0.01, "reg_weight": 0.1, "facts": 3, "documents_per_step": 2, "lengths": None}
    change = {"length": 130} if what == "lengths" else {what: other[what]}
    with pytest.raises(ConfigError, match=rf"{FILE} is of a run with other settings: .*{what} \(was ") as error:
        dataclasses.replace(METHOD, **change).scores(probe_of(random_model(), work=tmp_path))
    assert str(tmp_path / FILE) in str(error.value)


def test_a_state_of_another_model_seed_or_store_is_refused(tmp_path):
    cut_off(tmp_path)
    others = {
        "model": probe_of(random_model(seed=1), work=tmp_path),
        "seed": probe_of(random_model(), seed=1, work=tmp_path),
        "streaming": probe_of(random_model(), work=tmp_path, sink=SINK + 1),
        "documents": probe_of(random_model(), work=tmp_path),
    }
    others["documents"].documents.haystack.filler.successors[:] = 0
    for name, probe in others.items():
        with pytest.raises(ConfigError, match=rf"{name} \(was "):
            METHOD.scores(probe)


@pytest.mark.parametrize("kind", ["text", "cut", "other tensors", "no settings"])
def test_a_file_that_is_no_state_is_refused(kind, tmp_path):
    cut_off(tmp_path)
    path = tmp_path / FILE
    if kind == "text":
        path.write_text("gates")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        save_file({"x": torch.ones(1)}, path, {"settings": "{}"} if kind == "other tensors" else None)
    with pytest.raises(ConfigError, match=f"{FILE} is no state of a duo_gates run"):
        METHOD.scores(probe_of(random_model(), work=tmp_path))


def test_a_save_that_is_cut_off_keeps_the_state_of_before(tmp_path, monkeypatch):
    cut_off(tmp_path)
    before = (tmp_path / FILE).read_bytes()

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(_gates, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        METHOD.scores(probe_of(random_model(), work=tmp_path))
    assert (tmp_path / FILE).read_bytes() == before
    monkeypatch.undo()
    assert torch.equal(METHOD.scores(probe_of(random_model(), work=tmp_path)), METHOD.scores(probe_of(random_model())))


def test_one_process_sets_up_nothing_for_several(monkeypatch):
    before = dict(accelerate.PartialState._shared_state)
    METHOD.scores(probe_of(random_model()))
    assert accelerate.PartialState._shared_state == before
    alone = types.SimpleNamespace(process_index=0, num_processes=1)
    asked = []
    monkeypatch.setattr(accelerate, "PartialState", lambda **kwargs: asked.append(kwargs) or alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UnsupportedModeError, match="2 processes were launched"):
        METHOD.scores(probe_of(random_model()))
    assert asked == [{"cpu": True, "timeout": timedelta(days=30)}], "torch's own would end a wait of half an hour"


def test_an_unpatched_model_is_refused():
    probe = probe_of(random_model())
    unpatch_model(probe.model)
    with pytest.raises(UnsupportedModelError, match="patch_model"):
        DuoGates(**SHORT).scores(probe)


def test_a_work_folder_that_cannot_be_made_is_said_before_any_step(tmp_path):
    (tmp_path / "file").write_text("in the way")
    probe = probe_of(random_model(), work=tmp_path / "file" / "below")
    with pytest.raises(ConfigError, match="^work: .*below cannot be made"):
        DuoGates(**SHORT).scores(probe)
