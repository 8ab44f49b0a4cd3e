"""``bench decode --select``, ``bench crossover --decode``, and the scripts of examples/ about selections. No timing."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.scripts import script
from typer.testing import CliRunner

from hf_longctx import ConfigError, LongCtxError
from hf_longctx.bench import columns, crossover_decode, decode
from hf_longctx.bench.selections import SelectCase
from hf_longctx.bench.settings import Settings
from hf_longctx.commands._app import app
from hf_longctx.decode._selection import Selection

SHAPE = {"layers": 2, "heads": 8, "kv_heads": 4, "head_dim": 16, "sink": 4, "recent": 16, "rounds": 2}
FLAGS = [part for name, value in SHAPE.items() for part in (f"--{name.replace('_', '-')}", str(value))]
FEW = "page_bounds:page=8:budget=16:sink=4:recent=16"


def invoke(*args: str, width: int = 200):
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": str(width)})


def test_every_selection_has_two_columns_that_give_what_it_reads(tmp_path):
    path = tmp_path / "out.json"
    given = ["--select", f"{FEW},{FEW}:refresh=4", "--no-static", "--dtype", "fp32", "--tokens", "150", "--json", path]
    done = invoke("bench", "decode", *FLAGS, *given)
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())["results"][0]
    assert list(found["columns"]) == [
        "stock", "all retrieval", "half streaming", FEW, f"half, {FEW}", f"{FEW}:refresh=4", f"half, {FEW}:refresh=4",
    ]  # fmt: skip
    assert 0 <= found["error"] <= columns.TOLERANCE["fp32"]
    often, seldom = found["columns"][FEW], found["columns"][f"half, {FEW}:refresh=4"]
    assert (often["instead_of"], often["reused"]) == ("all retrieval", 0) and often["read"] < 0.4
    assert seldom["instead_of"] == "half streaming" and seldom["reused"] > 0
    assert "tokens read" in done.output and "vs dense" in done.output
    narrow = invoke("bench", "decode", *FLAGS, *given[:-2], width=80).output
    assert max(map(len, narrow.splitlines())) <= 80


def test_heads_that_vote_together_are_those_of_the_column():
    vote = "soft_vote:budget=16:sink=4:recent=16:similar=null:refresh=1"
    found = decode.run(Settings((150,), dtypes=("fp32",), static=False, select=(vote,), **SHAPE))
    assert found[0]["error"] <= columns.TOLERANCE["fp32"]


def test_a_wrong_choice_is_no_column(monkeypatch):
    real = Selection.choose

    def shifted(self, *given):
        chosen, reused = real(self, *given)
        chosen.entries += 1
        return chosen, reused

    monkeypatch.setattr(Selection, "choose", shifted)
    with pytest.raises(LongCtxError, match=f"the output of layer 0, {FEW}, differs"):
        decode.run(Settings((150,), dtypes=("fp32",), static=False, select=(FEW,), **SHAPE))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dense", "select: got 'dense', expected a selection that leaves tokens out"),
        ("pages", "select.select: got 'pages', expected one of: clusters"),
        ("page_bounds:pages=2", "select.pages: unknown key"),
        ("page_bounds:page", "WORD or WORD:field=value"),
    ],
)
def test_a_text_that_is_no_selection_is_refused(text, says):
    with pytest.raises(ConfigError, match=says):
        SelectCase.of(text)


def test_the_crossover_of_a_selection_is_an_override_of_decode(tmp_path):
    path = tmp_path / "out.json"
    shape = ["--heads", "8", "--kv-heads", "4", "--head-dim", "16", "--rounds", "2", "--dtype", "fp32"]
    picture = tmp_path / "out.png"
    given = ["--decode", FEW, "--tokens", "60,150", "--json", path, "--png", picture]
    done = invoke("bench", "crossover", *shape, *given)
    assert done.exit_code == 0, done.output
    assert picture.read_bytes()[1:4] == b"PNG"
    data = json.loads(path.read_text())
    assert [result["tokens"] for result in data["results"]] == [60, 150]
    assert data["results"][1]["columns"]["sparse"]["density"] < 0.4
    assert data["results"][0]["error"] <= columns.TOLERANCE["fp32"]
    assert data["subject"]["select"]["min_tokens"] == 0
    assert "a selection" in done.output
    refused = invoke("bench", "crossover", "--decode", FEW, "--pattern", "block_topk")
    assert refused.exit_code and "with --decode the shape is given" in refused.output


def test_its_verdict_keeps_what_was_given():
    case = crossover_decode.case_of(Settings((60, 150), **SHAPE), FEW)
    made = [{"dtype": "fp32", "tokens": tokens, "wins": tokens > 100} for tokens in (60, 150)]
    verdict = crossover_decode.facts(case, made)["crossover"]["fp32"]
    assert verdict["min_tokens"] == 150
    assert verdict["python"] == (
        "patch_model(model, decode={'retrieval': {'select': 'page_bounds', 'page': 8, 'budget': 16, 'sink': 4, "
        "'recent': 16, 'min_tokens': 150}})"
    )
    made = [{**one, "wins": False} for one in made]
    assert crossover_decode.facts(case, made)["crossover"]["fp32"]["min_tokens"] is None


def test_quality_of_selections_over_one_cache(tmp_path, monkeypatch, capsys):
    quality = script("selection_quality")
    out = tmp_path / "quality.jsonl"
    everything = "page_bounds:budget=4096:min_tokens=0"
    given = ["hf-longctx/tiny-llama", "--config", str(plain_config(tmp_path)), "--tokens", "300", "--samples", "1"]
    given += ["--tasks", "needle", "--roles", "none", "--out", str(out), "--texts", "0"]
    given += ["--select", f"{everything},page_bounds:budget=8:page=4:sink=4:recent=8:min_tokens=0:dense_layers=0"]
    monkeypatch.setattr("sys.argv", ["selection_quality.py", *given])
    quality.main()
    dense, whole, few = (json.loads(line) for line in out.read_text().splitlines())
    assert dense["nll"] == whole["nll"] != few["nll"]
    assert dense["read"] is whole["read"] is None and few["read"] < 0.2
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| heads | select | read | needle |" and len(rows) == 5
    before = out.read_text()
    quality.main()
    assert out.read_text() == before, "nothing is measured again"
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["selection_quality.py", *given, "--mass"])
    quality.main()
    masses = [[float(cell) for cell in row.split(" | ")[1:3]] for row in rows_of(capsys.readouterr().out)]
    (all_kept, all_best), (kept, best) = masses
    assert all_kept == all_best == 1 and 0.1 < kept < best < 1


def rows_of(text):
    return [line.removesuffix(" |") for line in text.splitlines()]


def plain_config(folder):
    from transformers import AutoConfig

    from hf_longctx import LongCtxConfig
    from hf_longctx.assets import asset

    model = LongCtxConfig.describe(AutoConfig.from_pretrained(asset("tiny-llama")))
    roles = ["R" * model["num_key_value_heads"]] * model["num_hidden_layers"]
    path = folder / "plain.yaml"
    path.write_text(json.dumps({"model": model, "heads": {"roles": roles}}))
    return path


def test_more_tokens_than_a_layer_may_hold(tmp_path, monkeypatch, capsys):
    million = script("million_tokens")
    given = ["--tokens", "20000", "--layers", "1", "--page", "1024", "--steps", "2", "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["million_tokens.py", *given])
    threads = torch.get_num_threads()
    million.main()
    told = json.loads(capsys.readouterr().out)
    assert torch.get_num_threads() == threads
    assert told["read"] == pytest.approx(2368 / 20000, rel=0.02) and len(told["token s"]) == 1
    assert told["cache in memory MB"] <= 7 and told["on disk MB"] >= 18 and told["dense MB"] == 41
