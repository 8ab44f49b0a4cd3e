"""``hf-longctx bench kernels``: what it compares, that it checks the two kernels, and the rows it writes. No timing."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers.kernel_faults import change_attend
from typer.testing import CliRunner

from hf_longctx import ConfigError, LongCtxError, UnsupportedModeError
from hf_longctx.bench import columns, kernels
from hf_longctx.bench.settings import Settings
from hf_longctx.commands._app import app
from hf_longctx.kernels import cpu, native
from hf_longctx.kernels._native_speed import FUNCTIONS
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.reads import All, Causal, Window

TINY = Settings((70, 150), heads=4, kv_heads=2, sink=4, recent=16, rounds=2)
FLAGS = ["--heads", "4", "--kv-heads", "2", "--head-dim", "16,32", "--sink", "4", "--recent", "16"]
FLAGS += ["--tokens", "70,150", "--rounds", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.setattr(kernels, "SHORTEST", 0)


def invoke(*args, width=80):
    return CliRunner().invoke(app, ["bench", "kernels", *map(str, args)], env={"COLUMNS": str(width)})


def test_the_table_has_80_columns_and_the_json_every_raw_time_and_the_rows(tmp_path):
    path, rows = tmp_path / "out.json", tmp_path / "rows.json"
    done = invoke(*FLAGS, "--json", path, "--rows", rows)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80 and done.stdout.count("┏") == 1, "one table"
    text = " ".join(done.stdout.split())
    for word in ("dense prefill", "window", "block lists", "decode", "fp32", "bf16", "head_dim 16, 32", native.arch()):
        assert word in text
    data = json.loads(path.read_text())
    cases = [(r["dtype"], r["function"], r["head_dim"], r["tokens"]) for r in data["results"]]
    assert cases == [(d, f, n, t) for d in ("fp32", "bf16") for f in FUNCTIONS for n in (16, 32) for t in (70, 150)]
    for result in data["results"]:
        assert 0 <= result["error"] <= columns.TOLERANCE[result["dtype"]] and result["faster"] > 0
        assert {name: column["kernel"] for name, column in result["columns"].items()} == {
            "torch": "cpu",
            "native": "native",
        }
        assert all(len(column["ms"]["raw_ms"]) == 2 for column in result["columns"].values())
    assert (data["arch"], data["settings"]["head_dim"]) == (native.arch(), [16, 32])
    assert json.loads(rows.read_text())["rows"] == sorted(data["rows"], key=kernels._key)
    for row in data["rows"]:
        own = [r for r in data["results"] if (r["function"], r["head_dim"]) == (row["function"], row["head_dim"])]
        own = {
            str(r["tokens"]): r["faster"] for r in own if columns.dtype_of(r["dtype"]) is getattr(torch, row["dtype"])
        }
        assert row["by_tokens"] == pytest.approx(own, abs=1e-3) and row["faster"] == min(row["by_tokens"].values())
        assert row["measured"]["threads"] == 1 and row["measured"]["torch"] == torch.__version__


def test_each_function_reads_what_it_says():
    for function, reads, queries in (
        ("dense", Causal, 150),
        ("window", Window, 150),
        ("blocks", BlockList, 150),
        ("few", Causal, 16),
        ("decode", All, 1),
    ):
        calls = kernels._calls(replace(TINY, head_dim=16), "bf16", function, 150)
        assert len(calls) == (kernels.BUFFERS if function == "decode" else 1)
        for q, segments, own in calls:
            assert type(own) is reads and q.shape == (1, 4, queries, 16) and q.dtype == torch.bfloat16
            assert [segment.longest for segment in segments] == ([4, 146] if function == "window" else [150])
        pointers = {segments[0].k.data_ptr() for _, segments, _ in calls}
        assert len(pointers) == len(calls), "a cache of its own for each"


def shorter_window(q, segments, reads):
    return q, segments, Window(reads.recent - 1, reads.first)


def one_key_less(q, segments, reads):
    return q, [replace(segments[0], length=segments[0].length - 1)], reads


@pytest.mark.parametrize("kernel", [cpu, native])
@pytest.mark.parametrize(
    ("reads", "change", "name"), [(Window, shorter_window, "window"), (All, one_key_less, "decode")]
)
def test_kernels_that_differ_are_not_timed(kernel, reads, change, name, monkeypatch):
    monkeypatch.setattr(kernels, "turns", lambda *args: pytest.fail("timed"))
    monkeypatch.setattr(kernels, "FUNCTIONS", (name,))
    change_attend(monkeypatch, kernel, reads, change)
    with pytest.raises(LongCtxError, match=rf"{name} over 70 tokens by kernel native differs"):
        kernels.run(kernels.case_of(replace(TINY, dtypes=("fp32",)), (16,)))


def test_quick_calls_are_repeated_and_a_sample_is_the_time_of_one(monkeypatch):
    monkeypatch.setattr(kernels, "SHORTEST", 0.01)
    assert kernels._repeats(lambda: None) > 100 and kernels._repeats(lambda: sum(range(10**6))) <= 10
    monkeypatch.setattr(kernels, "_repeats", lambda work: 5)
    calls, attend = [], native.attend
    monkeypatch.setattr(native, "attend", lambda *args: calls.append(1) or attend(*args))
    kernels._measured(replace(TINY, head_dim=16), "fp32", "decode", 70, lambda tokens: None)
    assert len(calls) == kernels.BUFFERS * (1 + TINY.rounds * 5)


def test_rows_of_other_machines_stay(tmp_path):
    path = tmp_path / "rows.json"
    row = {"arch": "avx2", "function": "window", "dtype": "float32", "head_dim": 64, "faster": 2.0}
    other = {**row, "arch": "avx512"}
    kernels.write_rows(path, [other, row], kernels.rows_of(path))
    kernels.write_rows(path, [{**row, "faster": 3.0}, {**row, "function": "dense"}], kernels.rows_of(path))
    assert kernels.rows_of(path) == [{**row, "function": "dense"}, {**row, "faster": 3.0}, other]
    kernels.write_rows(None, [row], [])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--head-dim", "64,x"], "'64,x' is not a list of"),
        (["--head-dim", "0"], r"head_dim must be numbers of at least 1"),
        (["--head-dim", "20"], "measures kernel native, which takes a head_dim that is a multiple of 16"),
        (["--tokens", "64"], "tokens must be more than 64 here, sink among them, given 64"),
        (["--tokens", "16", "--sink", "4"], "tokens must be more than 16 here"),
        (["--rows", "rows.txt"], "--rows: got 'rows.txt', expected a name that ends in .json"),
    ],
)
def test_what_it_refuses(args, message):
    done = invoke(*args, width=300)
    assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output


def test_a_file_of_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "run", lambda *args: pytest.fail("measured something"))
    path = tmp_path / "rows.json"
    for text in ("{}", "[", '{"rows": [{"arch": "avx2"}]}', "[]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="has no rows of bench kernels"):
            kernels.rows_of(path)
    done = invoke(*FLAGS, "--rows", path)
    assert done.exit_code == 2 and path.read_text() == "[]"


def test_without_the_kernel_it_says_why(monkeypatch):
    monkeypatch.setattr(native, "supports", lambda case: "could not be built: no compiler")
    with pytest.raises(UnsupportedModeError, match="measures kernel native, which could not be built: no compiler"):
        kernels.case_of(TINY)
