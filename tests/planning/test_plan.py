"""``LongCtxConfig.plan`` and ``hf-longctx plan``: the first rung that fits, in bytes that are really allocated."""

from __future__ import annotations

import json
import re
import sys
import types
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.tiny import config_for, tiny_config, tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_longctx import ConfigError, LongCtxConfig, LongCtxError, patch_model
from hf_longctx.bench.memory_check import fill
from hf_longctx.commands._app import app
from hf_longctx.config import words as registry
from hf_longctx.config.config import load_shipped
from hf_longctx.model.modules import state_of
from hf_longctx.planning import ladder
from hf_longctx.planning.find import find
from hf_longctx.planning.ladder import BITS, RULE, fewer_heads
from hf_longctx.planning.memory import DENSE, PATCHED, RESERVED, MemorySettings, longest
from hf_longctx.stores.base import Bytes
from hf_longctx.stores.full import Full

TOKENS, HEADS = 1000, 12
SCORES = [[0.9, 0.1, 0.8, 0.2], [0.7, 0.3, 0.6, 0.4], [0.95, 0.05, 0.85, 0.15]]
ZEROS = [[0.9, 0.0, 0.8, 0.0], [0.7, 0.0, 0.6, 0.0], [0.95, 0.0, 0.85, 0.0]]
FORM = {"dtype": "fp32", "chunk": 64}


def config_of(model, scores=SCORES, recent=256, **heads) -> LongCtxConfig:
    """A config whose heads have scores: half of them retrieval, in a window that can be halved twice."""
    config = config_for(model, sink=4, recent=recent)
    return config.override(heads={"scores": scores, "retrieval_fraction": 0.5, "confidence": "measured", **heads})


@pytest.fixture
def given(tmp_path):
    """Makes a model's folder with nothing but a config.json, and the YAML of a config for it."""

    def make(family="llama", config=None, **kwargs):
        tiny_config(family, **kwargs).save_pretrained(tmp_path / family)
        (config or config_of(tiny_model(family, **kwargs))).to_yaml(tmp_path / f"{family}.yaml")
        return str(tmp_path / family), str(tmp_path / f"{family}.yaml")

    return make


@pytest.fixture
def stores(monkeypatch):
    """Says which stores there are; the store ``quantized`` is a made-up one, whether there is a real one or not."""

    @dataclass(frozen=True)
    class Quantized(Full):
        bits: int = 8

        def nbytes(self, tokens, head_dim, itemsize, reserve=None):
            whole = super().nbytes(tokens, head_dim, itemsize, reserve)
            return whole if reserve is None else Bytes(whole.device * self.bits // (8 * itemsize))

    Quantized.__module__ = "hf_longctx.stores.quantized"
    made, words = types.ModuleType(Quantized.__module__), registry.words
    made.Quantized = Quantized

    def choose(*there):
        def listed(folder):
            return there if folder == "stores" else words(folder)

        monkeypatch.setitem(sys.modules, Quantized.__module__, made)
        monkeypatch.setattr(registry, "words", listed)
        monkeypatch.setattr(ladder, "words", listed)

    return choose


def rungs(path, config, tokens=TOKENS, way=PATCHED, **form):
    memory_model = find(path, MemorySettings(1, **{**FORM, **form}), config)
    return [rung for rung, _ in ladder.ladder(memory_model, way, tokens)]


def plan(path, config=None, **given):
    return LongCtxConfig.plan(path, **{"context": TOKENS, "config": config, **FORM, **given})


def invoke(*args: object):
    done = CliRunner().invoke(app, ["plan", *map(str, args)], env={"COLUMNS": "110"})
    assert "Traceback" not in done.output
    return done


# The first rung that fits.


@pytest.mark.parametrize("reserve", [False, True])
@pytest.mark.parametrize(("family", "sliding", "batch"), [("llama", None, 1), ("qwen2", 8, 3), ("mistral", None, 2)])
def test_the_first_rung_that_fits_is_chosen_and_its_bytes_are_allocated(
    family, sliding, batch, reserve, given, tmp_path
):
    path, config = given(family, sliding=sliding)
    way = RESERVED if reserve else PATCHED
    every = rungs(path, config, way=way, batch=batch)
    assert len(every) >= (5 if sliding is None else 4) and all(a.need.total > b.need.total for a, b in pairwise(every))
    for count, rung in enumerate(every, 1):
        found = plan(path, config, memory=rung.need.total, batch=batch, reserve=reserve)
        assert found.rungs == tuple(every[:count]) and found.need == rung.need
        assert all(one.need.total > found.settings.memory for one in found.rungs[:-1])
        found.config.to_yaml(tmp_path / "chosen.yaml")
        memory_model = find(path, found.settings, str(tmp_path / "chosen.yaml"))
        assert fill(memory_model, way, TOKENS).most == found.need.kv == memory_model.need(way, TOKENS).kv
        assert found.config == LongCtxConfig.from_yaml(config).override(**found.overrides)
        assert memory_model.config == found.config
    assert fill(find(path, found.settings, config), way, TOKENS).most > found.need.kv, (
        "a control: as it is it takes more"
    )
    one_less = plan(path, config, memory=every[0].need.total - 1, batch=batch, reserve=reserve)
    assert len(one_less.rungs) == 2


def test_the_order_of_the_ladder(given, stores):
    path, config = given()
    stores("full", "sink_recent")
    labels = [rung.label for rung in rungs(path, config, 8000)]
    half = [
        "retrieval_fraction 0.4375",
        "retrieval_fraction 0.375",
        "retrieval_fraction 0.3125",
        "retrieval_fraction 0.25",
    ]
    # 5.25, 4.5, 3.75 and 3 of 12 heads; a half goes up, so that the second is 5 again and saves nothing
    fewer = [half[0], half[2], half[3]]
    windows = ["recent 128", "recent 64"]
    assert labels == ["the config as it is", *fewer, *windows]
    stores("full", "quantized", "sink_recent")
    quantised = [f"store quantized, bits {bits}" for bits in BITS]
    every = rungs(path, config, 8000)
    assert [rung.label for rung in every] == ["the config as it is", *quantised, *fewer, *windows]
    assert every[0].overrides == {}
    assert every[-1].overrides == {
        "stores": {"retrieval": {"store": "quantized", "bits": 4}, "streaming": {"recent": 64}},
        "heads": {"retrieval_fraction": 0.25},
    }
    short = [rung.label for rung in rungs(path, config)]
    assert short == ["the config as it is", *quantised, *windows], "1000 tokens in 4 bits take less than a window"


def test_quantising_is_offered_where_it_takes_something_away(given, stores):
    path, _ = given()
    stores("full", "quantized", "sink_recent", "other")
    config = config_of(tiny_model())
    for store, bits in (
        ("full", [8, 4]),
        ({"store": "quantized", "bits": 8}, [4]),
        ({"store": "quantized", "bits": 4}, []),
    ):
        store = {"store": store} if isinstance(store, str) else store
        changes = ladder.quantised(config.override(stores={"retrieval": store}))
        assert [change["stores"]["retrieval"]["bits"] for change in changes] == bits
    other = types.SimpleNamespace(to_dict=lambda: {"stores": {"retrieval": {"store": "other"}}})
    assert list(ladder.quantised(other)) == [], "what a user chose is not replaced"


def test_one_more_step_is_one_more_rung(given, monkeypatch):
    path, config = given()
    before = rungs(path, config)

    def no_sinks(config):
        yield {"stores": {"streaming": {"sink": 5}}}  # takes more: left out
        yield {"stores": {"streaming": {"sink": 0}}}

    monkeypatch.setattr(ladder, "LADDER", (*ladder.LADDER, no_sinks))
    every = rungs(path, config)
    assert every[:-1] == before and every[-1].label == "sink 0"
    found = plan(path, config, memory=every[-1].need.total)
    assert found.config.stores.streaming.sink == 0 and found.config.stores.streaming.recent == 64


# Fewer heads: only such as were told apart, and never below the floor.


def shares(config) -> list[float]:
    return [change["heads"]["retrieval_fraction"] for change in fewer_heads(config)]


def test_no_cut_falls_among_heads_that_were_not_measured(given):
    model = tiny_model()
    config = config_of(model, ZEROS, retrieval_fraction=1.0)
    with pytest.raises(ConfigError, match="were not measured apart"):
        config.override(heads={"retrieval_fraction": 0.875})
    assert shares(config) == [0.5] * 4
    path, yaml = given(config=config)
    labels = [rung.label for rung in rungs(path, yaml)]
    assert labels.count("retrieval_fraction 0.5") == 1 and sum("fraction" in label for label in labels) == 1
    few = [[0.9] + [0.0] * 3, [0.0] * 4, [0.8] + [0.0] * 3]
    assert shares(config_of(model, few, retrieval_fraction=1.0)) == [], "2 of 12 heads are below the floor, half of all"


def test_equal_scores_of_no_confidence_are_not_cut():
    tied = [[0.9, 0.9, 0.5, 0.5]] * 3
    config = config_of(tiny_model(), tied, confidence="none", retrieval_fraction=1.0)
    assert shares(config) == [0.5] * 4
    assert shares(config.override(heads={"confidence": "measured"})) == [0.875, 0.75, 0.625, 0.5]


def test_a_share_that_cannot_be_cut_is_left_out_and_logged(given, caplog, stores):
    stores("full", "sink_recent")
    tied = [[0.9, 0.1, 0.8, 0.2]] * 3  # told apart head by head, but not layer by layer
    config = config_of(tiny_model(), tied, confidence="none", granularity="layer", retrieval_fraction=1.0)
    path, yaml = given(config=config)
    with caplog.at_level("INFO", "hf_longctx.planning.ladder"):
        labels = [rung.label for rung in rungs(path, yaml)]
    assert labels == ["the config as it is"] and "retrieval_fraction 0.5 left out" in caplog.text


@pytest.mark.parametrize("target", ["target_drop", "target_nll"])
def test_the_floor_is_what_was_found_for_a_target(target):
    model = tiny_model()
    assert shares(config_of(model)) == [0.4375, 0.375, 0.3125, 0.25]
    measured = {target: 0.01, "curve": [{"retrieval_heads": 6, "drop": 0.01}]}
    config = config_of(model, measured=measured)
    assert shares(config) == []
    other = {"other": {"scores": [[1.0 - score for score in row] for row in SCORES]}}
    assert len(shares(config.override(heads={"alternatives": other, "use": "other"}))) == 4, (
        "it was of the other scores"
    )
    assert shares(config_for(model, "mixed")) == [], "roles have no best heads"


def test_saved_memory_is_not_turned_into_more_heads(given, stores):
    config = config_of(tiny_model(), recent=512, retrieval_fraction=None, kv_budget=0.6, kv_budget_tokens=1000)
    smaller = config.override(stores={"streaming": {"recent": 64}})
    count = ["".join(one.roles()).count("R") for one in (config, smaller)]
    assert count[0] < count[1], "a control: by itself a budget takes more heads"
    stores("full", "quantized", "sink_recent")
    path, yaml = given(config=config)
    every = rungs(path, yaml)
    first = config.override(**every[1].overrides)
    assert every[1].label == "store quantized, bits 8" and first.roles() == config.roles()
    assert first.heads.kv_budget is None and config.override(**every[0].overrides) == config


# Nothing fits.


@pytest.mark.parametrize("reserve", [False, True])
def test_what_cannot_fit_is_refused_with_what_would(given, reserve, stores):
    stores("full", "sink_recent", "offloaded")
    path, config = given()
    way = RESERVED if reserve else PATCHED
    size = rungs(path, config, way=way, batch=2)[-1].need.total - 1
    with pytest.raises(LongCtxError) as refused:
        plan(path, config, memory=size, batch=2, reserve=reserve)
    said = str(refused.value)
    last = replace(find(path, MemorySettings(size, batch=2, **FORM), config))
    last = replace(
        last, config=last.config.override(heads={"retrieval_fraction": 0.25}, stores={"streaming": {"recent": 64}})
    )
    tokens = longest(last, way)
    assert 0 < tokens < TOKENS and last.need(way, tokens).total <= size < last.need(way, tokens + 1).total
    need = last.need(way, TOKENS)
    assert f"a context of at most {tokens} tokens" in said and f"The longest context with it: {tokens}." in said
    assert f"The smallest (recent 64) needs {need.total / 1e6:.2f} MB" in said and "fewer than 2 sequences" in said
    assert "(reserve)" not in said, "it can take tokens back, which costs more here than room to grow"
    enough = float(re.search(r"memory of at least (\S+) MB", said)[1])
    assert plan(path, config, memory=f"{enough}MB", batch=2, reserve=reserve).need == need
    assert len(plan(path, config, memory=size, batch=2, context=tokens, reserve=reserve).rungs) <= 6


def test_a_cache_that_never_grows_is_offered_where_it_helps(given):
    path, config = given()
    form = {"context": 2**15, "batch": 2}
    for reserve in (False, True):
        size = rungs(path, config, tokens=2**15, way=RESERVED if reserve else PATCHED, batch=2)[-1].need.total - 1
        with pytest.raises(LongCtxError) as refused:
            plan(path, config, memory=size, reserve=reserve, **form)
        assert ("(reserve)" in str(refused.value)) is not reserve


def test_a_slower_place_is_offered_where_it_helps(given):
    path, config = given()
    settings, elsewhere = MemorySettings(1, "fp32", chunk=64), {"retrieval": {"store": "offloaded"}}
    smallest = rungs(path, config, tokens=2**15)[-1]
    own = LongCtxConfig.from_yaml(config).override(**smallest.overrides).override(stores=elsewhere)
    need = replace(find(path, settings, config), config=own).need(PATCHED, 2**15).total
    assert need < smallest.need.total
    for size, said in ((need, r"\(store: offloaded\): [\d.]+ MB \(fits\)"), (need - 1, r"offloaded\): [\d.]+ MB;")):
        with pytest.raises(LongCtxError, match=said):
            plan(path, config, memory=size, context=2**15)


def test_weights_that_do_not_fit_are_said(given):
    path, config = given()
    with pytest.raises(LongCtxError, match=r"with it: none \(the weights alone take 2.00 GB\).*smaller weights"):
        plan(path, config, memory="1GB", weights="2GB")


def test_chunks_and_dense_are_offered_where_they_would_help(given):
    path, config = given()
    roomy = plan(path, config, memory="1GB", chunk=0, context=4096)
    tight = MemorySettings(1, "fp32", chunk=512)
    small = find(path, tight, config).need(PATCHED, 4096).total
    assert small < roomy.need.total
    with pytest.raises(LongCtxError, match=r"chunks of 512 tokens: [\d.]+ MB;"):
        plan(path, config, memory=find(path, tight, config).weights + 10**5, chunk=0, context=4096)
    everything = config_for(tiny_model(), "retrieval")
    path, config = given(config=everything)
    dense = plan(path, config, memory="1GB", context=100, chunk=0).dense.total
    with pytest.raises(LongCtxError, match="no patch: dense it needs"):
        plan(path, config, memory=dense, context=100, chunk=0)


# What is said.


def test_dense_that_fits_is_said_and_a_plan_is_given(given):
    path, config = given()
    found = plan(path, config, memory="1GB")
    assert found.dense_fits and found.overrides == {} and found.config == LongCtxConfig.from_yaml(config)
    assert "dense     fits: there is no need to patch" in str(found) and "chosen    the config as it is" in str(found)
    tight = plan(path, config, memory=found.dense.total - 1)
    assert not tight.dense_fits and "no need to patch" not in str(tight)


def test_what_is_not_known_is_said(given):
    model = tiny_model()
    curve = [{"retrieval_heads": 12, "exact_match": 1.0}, {"retrieval_heads": 6, "exact_match": 0.875}]
    path, config = given(config=config_of(model, measured={"curve": curve}, source={"method": "m", "from": "f"}))
    asis = plan(path, config, memory="1GB")
    assert asis.notes == ("6 of 12 KV heads keep every token; heads.measured has for that: exact_match 0.875",)
    size = next(rung for rung in rungs(path, config) if rung.label == "retrieval_fraction 0.25").need.total
    fewer = plan(path, config, memory=size)
    assert len(fewer.notes) == (2 if "stores" in fewer.overrides else 1)
    assert "3 of 12 KV heads keep every token, by m of f; what that costs was not measured" in fewer.notes[0]
    windows = plan(path, config, memory=rungs(path, config)[-1].need.total)
    assert "recent: 64" in windows.notes[1] and "what these stores cost was not measured" in windows.notes[1]
    assert "the model was made for 4096 tokens" in plan(path, config, memory="1GB", context=4097).notes
    assert len(plan(path, config, memory="1GB", context=4096).notes) == 1
    everything = config_for(model, "retrieval").override(heads={"confidence": "none"})
    path, config = given(config=everything)
    assert "were not measured, and hf-longctx identify measures them" in plan(path, config, memory="1GB").notes[0]


def test_the_rule_is_said_and_stands_in_the_docs(given):
    path, config = given()
    page = (Path(__file__).parents[2] / "docs" / "choosing.md").read_text("utf-8")
    flat = re.sub(r"\s+", " ", page.replace("\n> ", " "))
    assert RULE in flat and RULE in str(plan(path, config, memory="1GB"))


# The model: a name, a folder, a loaded one.


def test_a_shipped_config_needs_no_weights(monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args: pytest.fail("loaded"))
    found = LongCtxConfig.plan("llama-3.1-8b-instruct", context=131072, memory="24GB")
    memory_model = find("llama-3.1-8b-instruct", MemorySettings(24 * 10**9))
    assert found.rungs[0].need == memory_model.need(PATCHED, 131072) and found.rungs[0].need.total > 24 * 10**9
    assert found.need.total <= 24 * 10**9 and found.dense == memory_model.need(DENSE, 131072)
    shipped = load_shipped("llama-3.1-8b-instruct")
    assert found.config == shipped.override(**found.overrides) and found.config.model == shipped.model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_counted_and_left_alone(dtype, given):
    model = tiny_model(dtype=dtype)
    path, config = given()
    before, own = model.config, LongCtxConfig.from_yaml(config)
    found = LongCtxConfig.plan(model, context=TOKENS, memory="1GB", config=own, chunk=64)
    assert model.config is before and state_of(model) is None
    word = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    named = plan(path, config, memory="1GB", dtype=word)
    assert (found.need, found.dense, found.config) == (named.need, named.dense, named.config)
    assert found.settings.weights == sum(p.numel() * p.element_size() for p in model.parameters()) == found.need.weights
    patch_model(model, own)
    state = state_of(model)
    again = LongCtxConfig.plan(model, context=TOKENS, memory="1GB", chunk=64)
    assert again.need == found.need and again.config == own and state_of(model) is state
    model.half()
    assert LongCtxConfig.plan(model, context=TOKENS, memory="1GB", chunk=64).settings.dtype == "bf16"
    with pytest.raises(ConfigError, match="dtype: got 'torch.float64', expected one of: fp32, bf16"):
        LongCtxConfig.plan(model.double(), context=TOKENS, memory="1GB")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"context": 0}, "context: got 0, expected a whole number of tokens"),
        ({"context": 1.5}, "context: got 1.5"),
        ({"memory": "24"}, "memory: '24' is no size such as 24GB"),
        ({"memory": 2.5}, "memory: 2.5 is no size"),
        ({"memory": 0}, "memory: got 0, expected a whole number, at least 1"),
        ({"batch": "2"}, "batch: got .2., expected a whole number, at least 1"),
        ({"chunk": -1}, "chunk: got -1, expected a whole number, at least 0"),
        ({"dtype": "fp8"}, "dtype: got 'fp8', expected one of: fp32, bf16"),
        ({"weights": True}, "weights: True is no size"),
        ({"config": "tiny-llama"}, "tiny-llama is a config itself"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        LongCtxConfig.plan("tiny-llama", **{"context": 10, "memory": "1GB", **wrong})
    with pytest.raises(TypeError, match="contexts"):
        LongCtxConfig.plan("tiny-llama", contexts=10, memory="1GB")


# The command.


def test_the_command_prints_the_plan_and_writes_it(given, tmp_path):
    path, config = given()
    size = rungs(path, config)[-1].need.total
    out, data = tmp_path / "plan.yaml", tmp_path / "plan.json"
    args = ("--config", config, "--context", TOKENS, "--dtype", "fp32", "--chunk", 64)
    memory = f"{size / 1e6:.6f}MB"
    done = invoke(path, *args, "--memory", memory, "--out", out, "--json", data)
    assert done.exit_code == 0, done.output
    found = plan(path, config, memory=size)
    assert " ".join(str(found).split()) in " ".join(done.output.split()) and str(out) in done.output
    lines = done.output.splitlines()[:-1]  # the last one has a path
    assert max(map(len, lines)) <= 110 < max(map(len, str(found).splitlines()))
    assert LongCtxConfig.from_yaml(out) == found.config
    told = json.loads(data.read_text())
    assert told.pop("environment")["torch"] == torch.__version__
    assert told == json.loads(json.dumps(found.as_dict()))
    assert [one["label"] for one in told["rungs"]] == [rung.label for rung in found.rungs]
    model = patch_model(tiny_model(), str(out))
    assert state_of(model).config == found.config
    reserved = invoke(path, *args, "--memory", "1GB", "--reserve", "--batch", 3, "--weights", "900MB")
    assert (
        reserved.exit_code == 0 and "max_tokens=1000) makes it" in reserved.output and "3 sequences" in reserved.output
    )
    assert "900.00 MB" not in reserved.output and re.search(r"the config as it is +0\.90 ", reserved.output)


def test_a_refusal_writes_nothing(given, tmp_path):
    path, config = given()
    out, data = tmp_path / "plan.yaml", tmp_path / "plan.json"
    args = ("--config", config, "--context", TOKENS, "--memory", "100MB", "--weights", "1GB")
    done = invoke(path, *args, "--out", out, "--json", data)
    assert done.exit_code == 2 and "LongCtxError: 1000 tokens of" in done.output and "What would help" in done.output
    assert not out.exists() and not data.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("tiny-lama", "--context", 9, "--memory", "1GB"), "Did you mean 'tiny-llama'?"),
        (("tiny-llama", "--context", 9, "--memory", "1"), "--memory: '1' is no size such as 24GB"),
        (("tiny-llama", "--context", 9, "--memory", "1GB", "--dtype", "x"), "--dtype: got 'x'"),
        (("tiny-llama", "--context", 9, "--memory", "1GB", "--out", "a.json"), "--out: got 'a.json'"),
        (("tiny-llama", "--context", 9, "--memory", "1GB", "--json", "a.yaml"), "--json: got 'a.yaml'"),
        (("tiny-llama", "--context", 0, "--memory", "1GB"), "--context"),
    ],
)
def test_what_the_command_refuses(args, message):
    done = invoke(*args)
    assert done.exit_code == 2 and message in done.output, done.output
