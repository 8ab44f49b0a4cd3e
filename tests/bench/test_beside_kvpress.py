"""examples/eviction_beside_kvpress.py: what its rows mean, its tables, and both sides of it without kvpress."""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from helpers.scripts import script

from hf_longctx import ConfigError
from hf_longctx.assets import asset
from hf_longctx.cache.seam import CACHE
from hf_longctx.commands._options import load_model
from hf_longctx.tasks import tasks_from
from hf_longctx.tasks.language import language_for

kvpress_checks = script("kvpress_checks")
kvpress_rows = script("kvpress_rows")
kvpress_sides = script("kvpress_sides")
beside = script("eviction_beside_kvpress")
Row, rows_from = kvpress_rows.Row, kvpress_rows.rows_from
CONFIG = "smollm2-135m-instruct"
TINY = "tiny-llama"


@dataclass
class KeepLastPress:
    """In kvpress's interface: the newest keys stay."""

    compression_ratio: float

    def post_init_from_model(self, model) -> None:
        pass

    @contextmanager
    def __call__(self, model):
        hooks = [layer.self_attn.register_forward_hook(self.first, with_kwargs=True) for layer in model.model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def first(self, module, args, kwargs, output):
        new, held = kwargs["hidden_states"].shape[1], kwargs[CACHE].layers[module.layer_idx].keys.shape[2]
        return (
            self.forward_hook(module, args, {**kwargs, "cache_position": range(new)}, output) if new == held else None
        )

    def forward_hook(self, module, args, kwargs, output):
        layer = kwargs[CACHE].layers[module.layer_idx]
        assert kwargs["hidden_states"].shape[1] == layer.keys.shape[2] == len(kwargs["cache_position"])
        kept = round(layer.keys.shape[2] * (1 - self.compression_ratio))
        layer.keys, layer.values = (x[:, :, -kept:].contiguous() for x in (layer.keys, layer.values))
        return output


@dataclass
class ThinKPress:
    key_channel_compression_ratio: float


@dataclass
class AdaKVPress:
    press: KeepLastPress


KVPRESS = SimpleNamespace(KeepLastPress=KeepLastPress, ThinKPress=ThinKPress, AdaKVPress=AdaKVPress)


def test_rows_are_read_and_take_the_budgets_unless_they_name_one():
    found = rows_from("dense, kvpress/TOVA, ours/snapkv:window=8:by=head@0.25,ours/int8,kvpress/TOVA@0.5", [0.5, 0.1])
    assert list(map(str, found)) == [
        *("dense", "kvpress/TOVA@0.5", "kvpress/TOVA@0.1"),
        *("ours/snapkv:window=8:by=head@0.25", "ours/int8"),
    ]
    every = rows_from("kvpress,ours", [0.3])
    assert len(every) == len(kvpress_rows.PRESSES) + len(kvpress_rows.SAME) + len(kvpress_rows.PLAIN)
    assert {row.name for row in every if row.side == "kvpress"} <= {row.name for row in every if row.side == "ours"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("theirs/TOVA", "expected dense, kvpress, ours"),
        ("kvpress/", "expected dense, kvpress, ours"),
        ("dense/TOVA", "expected dense, kvpress, ours"),
        ("dense@0.5", "has no budget. Leave @0.5 out"),
        ("ours/int8@0.5", "has no budget"),
        ("kvpress/TOVA@half", "expected a share after @"),
        ("kvpress/TOVA@2", "expected shares above 0, at most 1"),
    ],
)
def test_what_is_no_row_is_an_error(text, message):
    with pytest.raises(ConfigError, match=message):
        rows_from(text, [0.5])


def test_a_budget_is_what_a_press_leaves():
    assert kvpress_rows.press_of(KVPRESS, Row("kvpress", "KeepLast", 0.25)) == KeepLastPress(0.75)
    assert kvpress_rows.press_of(KVPRESS, Row("kvpress", "ThinK", 0.5)) == ThinKPress(0.5)
    assert kvpress_rows.press_of(KVPRESS, Row("kvpress", "AdaKV(KeepLast)", 0.5)) == AdaKVPress(KeepLastPress(0.5))


def test_a_row_of_ours_is_a_config():
    found = kvpress_rows.overrides_of(Row("ours", "snapkv:window=8:by=head:sink=0", 0.3), CONFIG)
    store = {"store": "evicted", "rule": {"score": "snapkv", "window": 8}, "budget": {"share": 0.3}}
    assert found["stores"]["retrieval"] == {**store, "by": "head", "sink": 0}
    assert found["heads"] == {"roles": ["RRR"] * 30}
    assert "heads" not in kvpress_rows.overrides_of(Row("ours", "snapkv:heads=config", 0.3), CONFIG)
    assert kvpress_rows.overrides_of(Row("ours", "half_streaming"), CONFIG) == {}
    same = kvpress_rows.overrides_of(Row("ours", "AdaKV(SnapKV)", 0.3), CONFIG)["stores"]["retrieval"]
    assert same["rule"] == {"score": "snapkv", "window": 64} and (same["by"], same["recent"]) == ("head", 64)
    few = Row("ours", "tova:by=uniform:keep=quantized:after=drop", 0.3)
    few = kvpress_rows.overrides_of(few, CONFIG)["stores"]["retrieval"]
    assert few["keep"] == {"store": "quantized"} and few["after"] == {"after": "drop"}
    with pytest.raises(ConfigError, match="expected all or config"):
        kvpress_rows.overrides_of(Row("ours", "snapkv:heads=few", 0.3), CONFIG)


def test_budgets_of_an_eviction_share_what_is_read():
    rows = rows_from("ours/snapkv,ours/ThinK,ours/int8,ours/key_norm", [0.5, 0.25])
    assert [len(group) for group in kvpress_rows.read_alike(rows)] == [2, 1, 1, 1, 2]


def line(row: str, case: str, where: str, nll: list[float], right: list[bool], held: int = 50, **more) -> dict:
    own = {"key": f"{case} {row} {where}", "kind": "answers", "row": row, "budget": 0.5, "tokens": 64, "case": case}
    found = {"nll": nll, "right": right, "counts": [2] * len(nll), "bytes": held, "dense_bytes": 100}
    return {**own, "where": where, **found, **more}


def test_the_table_counts_what_every_row_was_asked():
    lines = [
        line("ours/a", "one", "inside", [9.0], [False]),  # measured again below
        line("ours/a", "one", "inside", [2.0, 4.0], [True, False]),
        line("ours/a", "two", "inside", [8.0], [True]),
        line("kvpress/b", "one", "inside", [1.0], [True], held=100),
        {"key": "x", "kind": "answers", "row": "c", "budget": 0.1, "tokens": 64, "where": "inside", "refused": "E: no"},
    ]
    head, _, *rows, end = kvpress_rows.tables(lines)
    assert head.startswith("| 64 tokens, 1 + 0 asked | keep | inside")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells == [
        ["ours/a", "0.5", "1, 1.000", "", "0.50"],
        ["kvpress/b", "0.5", "1, 0.500", "", "1.00"],
        ["c", "0.1", "refused", "", ""],
    ]
    assert not end and len({len(row) for row in rows}) == 1


def test_the_widest_rows_fit_80_columns_and_what_was_refused_is_measured_again():
    names = [f"kvpress/{name}" for name in kvpress_rows.PRESSES] + [f"ours/{name}" for name in kvpress_rows.SAME]
    lines = [line(name, "one", where, [19.0] * 99, [True] * 99) for name in names for where in ("inside", "after")]
    cost = {"bytes": 100, "live": 110, "prompt_s": 100.0, "token_ms": 100.0, "tokens": 131072, "budget": 0.15}
    lines += [{"key": name, "kind": "costs", "row": name, **cost} for name in [*names, "dense"]]
    lines += [{"key": "no", "kind": "costs", "row": "no", "budget": None, "tokens": 131072, "refused": "E: no"}]
    told = list(kvpress_rows.tables(lines))
    assert max(map(len, told)) <= 80 and any("refused" in row for row in told)
    assert "no" not in kvpress_rows.measured(lines) and len(kvpress_rows.measured(lines)) == len(lines) - 1


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = load_model(str(asset(TINY)), "float32", torch.device("cpu"))
    return model, language_for(tokenizer, None, None, False), tokenizer


def test_both_sides_answer_alike_where_everything_stays(tiny):
    model, language, _ = tiny
    sample = tasks_from("needle:variant=multi_key:needles=3:questions=2")[0].make(language, 256)
    rows = [Row("dense"), Row("kvpress", "KeepLast", 1.0), Row("kvpress", "KeepLast", 0.25)]
    with torch.no_grad():
        found = {(str(row), where): one for row, where, one in theirs(model, rows, sample)}
        own = [Row("ours", "key_norm:by=uniform:sink=0:recent=0", share) for share in (1.0, 0.25)]
        found |= {(str(row), where): one for row, where, one in ours(tiny, own, sample)}
    for where in ("inside", "after"):
        dense = found["dense", where]
        assert dense["right"] == [True, True] and dense["bytes"] == dense["dense_bytes"]
        for whole in ("kvpress/KeepLast@1", "ours/key_norm:by=uniform:sink=0:recent=0@1"):
            assert found[whole, where]["nll"] == pytest.approx(dense["nll"], abs=1e-4)
        assert found["kvpress/KeepLast@0.25", where]["bytes"] == pytest.approx(dense["bytes"] / 4, rel=0.02)
        assert found["kvpress/KeepLast@0.25", where]["nll"] != pytest.approx(dense["nll"], abs=1e-2)
        few = found["ours/key_norm:by=uniform:sink=0:recent=0@0.25", where]
        assert few["bytes"] < few["dense_bytes"] / 3 and few["nll"] != pytest.approx(dense["nll"], abs=1e-2)


def test_a_score_that_reads_on_is_asked_once_for_all_budgets(tiny):
    _, language, _ = tiny
    sample = tasks_from("passkey")[0].make(language, 256)
    with torch.no_grad():
        rows = [Row("ours", "kvzip:chunk=64:words=false:by=model:recent=8", share) for share in (1.0, 0.5, 0.1)]
        found = {(row.budget, where): one for row, where, one in ours(tiny, rows, sample)}
    for where in ("inside", "after"):
        held = [found[share, where]["bytes"] / found[share, where]["dense_bytes"] for share in (1.0, 0.5, 0.1)]
        assert held == sorted(held, reverse=True) and held[1] < 0.7 and held[2] < 0.3
        assert found[1.0, where]["right"] == [True]


def theirs(model, rows, sample):
    return kvpress_sides.theirs(kvpress_sides.Stock(model, KVPRESS), rows, sample, 2)


def ours(tiny, rows, sample):
    model, _, tokenizer = tiny
    return kvpress_sides.ours(model, tokenizer, TINY, rows, sample, 2)


def test_a_row_that_does_not_run_is_a_line_that_says_why(tiny):
    model, language, _ = tiny
    sample = tasks_from("passkey")[0].make(language, 128)
    with torch.no_grad():
        found = [*theirs(model, [Row("kvpress", "Nothing", 0.5)], sample)]
        found += ours(tiny, [Row("ours", "nothing", 0.5)], sample)
    assert [one["refused"].partition(":")[0] for _, _, one in found] == ["AttributeError"] * 2 + ["ConfigError"] * 2


@pytest.mark.parametrize("name", ["padding", "assisted", "turns", "presses"])
def test_checks_find_what_a_press_gets_wrong(tiny, name):
    model, language, _ = tiny
    rows = [Row("dense"), Row("ours", "key_norm:by=head:recent=8", 0.5), Row("kvpress", "KeepLast", 0.5)]
    with torch.no_grad():
        dense, ours, theirs = (kvpress_checks.check(name, model, KVPRESS, TINY, row, language, 256) for row in rows)
    if name == "presses":
        assert theirs == "largest difference 0, masks the same" and dense == ours == "used as meant"
    elif name == "assisted":
        assert dense == ours == "16 of 16 tokens the same" != theirs
    else:
        off = [float(re.search(r"difference ([\d.e+-]+)", found)[1]) for found in (dense, ours, theirs)]
        assert off[0] < 1e-4 and off[1] < 1e-4 and off[2] > 1e-2


def test_a_check_that_fails_says_how(tiny):
    model, language, _ = tiny
    found = kvpress_checks.check("turns", model, KVPRESS, TINY, Row("ours", "nothing", 0.5), language, 256)
    assert found.startswith("ConfigError: stores.retrieval.rule.score: got 'nothing'")
    found = kvpress_checks.check("turns", model, KVPRESS, TINY, Row("kvpress", "KVzip", 0.5), language, 256)
    assert found.startswith("not tried")


def test_without_kvpress_the_error_says_where_to_read_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    assert beside.kvpress_for([Row("dense"), Row("ours", "int8")]) is None
    with pytest.raises(ConfigError, match="kvpress cannot be imported here"):
        beside.kvpress_for([Row("kvpress", "TOVA", 0.5)])


def test_the_script_measures_once_and_prints_its_table(tmp_path, monkeypatch, capsys):
    out = tmp_path / "lines.jsonl"
    given = ["x", f"hf-longctx/{TINY}", "--config", TINY, "--tokens", "128", "--tasks", "passkey", "--questions", "1"]
    given += ["--rows", "dense,ours/key_norm:recent=8@0.5", "--dtype", "float32", "--out", str(out)]
    for more in ([], ["--costs", "--steps", "2"], []):
        monkeypatch.setattr(sys, "argv", [*given, *more])
        beside.main()
    told = capsys.readouterr()
    assert len(out.read_text("utf-8").splitlines()) == 2 * 2 + 2 and len(told.err.splitlines()) == 6
    assert "| 128 tokens, 1 + 1 asked" in told.out and "token ms" in told.out
