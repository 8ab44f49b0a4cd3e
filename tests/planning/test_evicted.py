"""What a store of which tokens are evicted takes, while a prompt is read and after it: calculated is allocated."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers.caches import read
from helpers.tiny import config_for, tiny_config, tiny_model
from typer.testing import CliRunner

from hf_longctx import LongCtxCache, LongCtxConfig, LongCtxError, patch_model
from hf_longctx.bench.memory_check import check, fill
from hf_longctx.commands._app import app
from hf_longctx.config.words import load
from hf_longctx.planning.find import find, loaded
from hf_longctx.planning.memory import DENSE, PATCHED, RESERVED, MemoryModel, MemorySettings, longest
from hf_longctx.stores.evicted import Budget, Evicted

TOKENS = 300
PAGES = {"select": "page_bounds", "budget": 32, "sink": 4, "recent": 16, "min_tokens": 32}
KEYS, LAST, ALL = {"score": "key_norm"}, {"score": "snapkv", "window": 16}, {"score": "observed", "mean": True}
STATE = {"score": "expected_attention", "future": 16}


@pytest.fixture
def planned(tmp_path):
    """Makes a memory model of a tiny llama whose retrieval heads evict as said."""

    def make(roles="retrieval", batch=1, dtype="fp32", chunk=64, decode=None, **store) -> MemoryModel:
        tiny_config("llama").save_pretrained(tmp_path)
        sections = {"stores": {"retrieval": {"store": "evicted", "recent": 16, **store}}}
        sections |= {} if decode is None else {"decode": {"retrieval": decode}}
        config_for(tiny_model(), roles, 4, 16).override(**sections).to_yaml(tmp_path / "x.yaml")
        return find(str(tmp_path), MemorySettings(10**9, dtype, batch, chunk), str(tmp_path / "x.yaml"))

    return make


@pytest.mark.spanning(("by", "rule"))
@pytest.mark.parametrize("by", ["uniform", "head", "layer", "model"])
@pytest.mark.parametrize("rule", [KEYS, LAST, ALL, STATE], ids=lambda rule: rule["score"])
@pytest.mark.parametrize("budget", [{"share": 0.3}, {"tokens": 100}, {"share": 1.0}], ids=str)
def test_the_calculation_is_what_is_allocated(by, rule, budget, planned):
    for batch, dtype, roles in ((1, "fp32", "retrieval"), (3, "bf16", "mixed")):
        made = planned(roles, batch, dtype, by=by, rule=rule, budget=budget)
        for way in (PATCHED, RESERVED):
            found = check(made, way, TOKENS)
            assert found == (made.kv(way, TOKENS), made.kv_left(way, TOKENS))
            assert found.left < found.most or budget == {"share": 1.0}
        assert made.kv(DENSE, TOKENS) == made.kv_left(DENSE, TOKENS) and made.exact


@pytest.mark.parametrize("tokens", [1, 15, 20, 21, 99, 1000])
def test_at_any_length(tokens, planned):
    for by in ("head", "layer"):
        made = planned(by=by, rule=LAST, budget={"share": 0.25})
        assert all(check(made, way, tokens).most for way in (PATCHED, RESERVED))


@pytest.mark.parametrize(
    "store",
    [
        {"by": "uniform", "keep": {"store": "quantized", "group": 16, "residual": 16}},
        {"by": "layer", "keep": {"store": "offloaded", "page": 16, "recent": 32}},
        {"after": {"after": "merge"}},
        {"by": "uniform", "after": {"after": "merge"}},
        {"by": "uniform", "decode": {**PAGES, "dense_layers": 0}},
        {"by": "layer", "decode": {**PAGES, "dense_layers": 1}},
    ],
    ids=str,
)
def test_whatever_is_made_of_what_is_left(store, planned):
    made = planned(rule=LAST, budget={"share": 0.5}, **store)
    for way in (PATCHED, RESERVED):
        check(made, way, TOKENS)
    plain = planned(rule=LAST, budget={"share": 0.5}, by="uniform")
    assert made.kv_left(PATCHED, TOKENS) != plain.kv_left(PATCHED, TOKENS), "a control: it is counted"


@pytest.mark.parametrize("by", ["uniform", "head", "layer", "model"])
@pytest.mark.parametrize("every", [50, 128])
def test_evictions_within_a_prompt_bound_its_peak(by, every, planned):
    whole = planned(by=by, rule=LAST, budget={"tokens": 60}).kv(PATCHED, 1000)
    made = planned(by=by, rule=LAST, budget={"tokens": 60}, every=every)
    assert not made.exact and made.kv(PATCHED, 1000) < whole / 2
    for chunk in (0, 64, 50):
        for rule, budget in ((LAST, {"tokens": 60}), (ALL, {"share": 0.3})):
            check(planned(chunk=chunk, by=by, rule=rule, budget=budget, every=every), PATCHED, 400)
    if by == "uniform":
        assert made.kv(PATCHED, 1000) == fill(made, PATCHED, 1000).most


@pytest.mark.parametrize("tokens", [1, 20, 21, 300])
def test_thinned_keys(tokens, planned):
    for dtype in ("fp32", "bf16"):
        made = planned(dtype=dtype)
        thin = {"store": "thin", "ratio": 0.5, "window": 16, "recent": 20}
        made = replace(made, config=made.config.override(stores={"retrieval": thin}))
        for way in (PATCHED, RESERVED):
            found = check(made, way, tokens)
            assert tokens < 300 or found.left < found.most


def test_a_score_that_is_asked_is_counted_and_not_asked(planned):
    made = planned(rule={"score": "surprisal"}, budget={"share": 0.3}, by="uniform")
    assert check(made, PATCHED, TOKENS).left is None and made.ends == "Once it has ended"
    made = planned(rule={"score": "kvzip"}, budget={"share": 0.3})
    assert check(made, PATCHED, TOKENS).left is None
    assert made.kv_left(PATCHED, TOKENS) < 0.5 * made.kv(PATCHED, TOKENS) and "compress" in made.ends


@pytest.mark.parametrize("by", ["uniform", "head"])
@pytest.mark.parametrize("rule", [{"score": "surprisal"}, {"score": "kvzip", "words": False}], ids=str)
def test_what_was_said_of_the_tokens_that_are_left_is_counted(rule, by):
    if by == "head" and load("eviction", rule["score"]).alike:
        by = "layer"
    model = tiny_model(layers=2)
    store = {"store": "evicted", "rule": rule, "budget": {"share": 0.3}, "by": by, "recent": 16}
    patch_model(model, config_for(model, "retrieval"), stores={"retrieval": store})
    made, cache = loaded(model, MemorySettings(10**9, "fp32", 1, 0)), LongCtxCache(model, rollback=False)
    read(model, cache, torch.randint(3, 97, (1, TOKENS)))
    if rule["score"] == "kvzip":
        cache.compress()
    read(model, cache, torch.randint(3, 97, (1, 1)))
    assert cache.nbytes == made.kv_left(PATCHED, TOKENS)


def test_layers_in_pairs_take_at_most_what_is_said(planned):
    made = planned()
    made = replace(made, config=made.config.override(stores={"retrieval": {"store": "paired", "start": 0}}))
    assert not made.exact and check(made, PATCHED, TOKENS).left <= made.kv_left(PATCHED, TOKENS)


def test_a_wrong_calculation_is_noticed(planned, monkeypatch):
    made, nbytes = planned(rule=LAST), Evicted.nbytes
    more = lambda *args: nbytes(*args)._replace(device=nbytes(*args).device + 1)  # noqa: E731
    monkeypatch.setattr(Evicted, "nbytes", more)
    with pytest.raises(LongCtxError, match="bytes once the prompt has ended and takes"):
        check(made, PATCHED, TOKENS)


@pytest.mark.parametrize("by", ["uniform", "head", "layer"])
def test_a_model_that_reads_a_prompt_takes_as_much(by):
    """Not zeros written by hand, but a prompt read by a model."""
    model = tiny_model()
    store = {"store": "evicted", "rule": LAST, "budget": {"share": 0.3}, "by": by, "recent": 16}
    patch_model(model, config_for(model, "retrieval"), stores={"retrieval": store})
    made = loaded(model, MemorySettings(10**9, "fp32", 1, 0))
    cache = LongCtxCache(model, rollback=False)
    read(model, cache, torch.randint(3, 97, (1, TOKENS)))
    assert cache.nbytes == made.kv(PATCHED, TOKENS)
    read(model, cache, torch.randint(3, 97, (1, 1)))
    assert cache.nbytes == made.kv_left(PATCHED, TOKENS) < 0.5 * made.kv(PATCHED, TOKENS)


@pytest.mark.quick
def test_a_pyramid_has_the_mean_of_its_budget():
    spec = Evicted(budget=Budget(tokens=200), by="layer", sink=4, recent=16)
    kept = [spec.in_layer(at, 5, 1000).cached_tokens(1000) for at in range(5)]
    assert kept == sorted(kept, reverse=True) and kept[0] > 300 and sum(kept) == 5 * 200
    assert spec.in_layer(0, 5, 100) is spec, "nothing leaves"
    assert Evicted(by="head").in_layer(0, 5, 1000) == Evicted(by="head")


@pytest.mark.quick
def test_shares_of_a_config_count_what_is_left():
    model = tiny_model()
    store = {"store": "evicted", "budget": {"share": 0.25}, "by": "uniform", "rule": KEYS, "recent": 16}
    config = config_for(model, "retrieval", stores={"retrieval": store})
    dense, kept = config.kv_bytes(4000)
    assert kept == dense // 4
    ragged = config.override(stores={"retrieval": {"by": "head"}})
    assert dense // 4 < ragged.kv_bytes(4000)[1] < 0.29 * dense


def test_plan_and_bench_memory_say_both_moments(planned, tmp_path):
    made = planned(by="head", rule=LAST, budget={"share": 0.25})
    need = made.need(PATCHED, 1000)
    assert need.kv_left < need.kv / 2 and need.total == need.weights + need.kv + need.working
    found = LongCtxConfig.plan(str(tmp_path), context=1000, memory="1GB", dtype="fp32", config=str(tmp_path / "x.yaml"))
    assert "evicted   KV is counted while the prompt is read. Once it has ended the cache takes" in str(found)
    args = [
        "--config",
        tmp_path / "x.yaml",
        "--memory",
        "2MB",
        "--dtype",
        "fp32",
        "--check",
        "--json",
        tmp_path / "y.json",
    ]
    done = CliRunner().invoke(app, ["bench", "memory", str(tmp_path), *map(str, args)], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    said = " ".join(done.output.split())
    assert "KV is what the cache takes while the prompt is read. Once it has ended: patched 0.00 GB" in said
    assert "Allocated then: patched 0.000 GB" in said
    rows = json.loads((tmp_path / "y.json").read_text())["results"]
    assert rows[1]["checked"]["bytes_left"] == rows[1]["need"]["kv_left"] < rows[1]["need"]["kv"]
    whole = planned(by="head", rule=LAST, budget={"share": 1.0})
    assert longest(made, PATCHED) == longest(whole, PATCHED), "the peak is the whole prompt: no longer one fits"
