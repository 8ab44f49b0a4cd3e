"""``hf-longctx bench``: the columns compute the same, and JSON and terminal say what was measured. No timing."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from helpers.kernel_faults import change_attend
from rich.console import Console
from typer.testing import CliRunner

from hf_longctx import ConfigError, LongCtxCache, LongCtxError, UnsupportedModeError
from hf_longctx.bench import block_lists, columns, decode, e2e, environment, prefill, show
from hf_longctx.bench.measure import Samples, paired_ratio, turns
from hf_longctx.bench.settings import Settings
from hf_longctx.commands._app import app
from hf_longctx.kernels import cpu
from hf_longctx.layout.blocks import BlockList

SHAPE = {"layers": 2, "heads": 8, "kv_heads": 4, "head_dim": 16, "sink": 4, "recent": 16, "rounds": 2}
TINY = Settings((65, 150), **SHAPE)
FLAGS = [part for name, value in SHAPE.items() for part in (f"--{name.replace('_', '-')}", str(value))]
NAMES = {
    "decode": ["stock", "stock static", "all retrieval", "half streaming"],
    "prefill": ["stock", "all retrieval", "all streaming", "blocks 10%", "blocks 20%", "blocks 30%"],
    "e2e": ["stock", "stock static", "all retrieval", "half streaming", "all streaming"],
}
list_answer = block_lists.list_answer
RAW = {  # benchmark -> (figures with raw times, samples per column)
    "decode": (["ms_per_layer", "sum_ms_per_layer"], 2 * 3),
    "prefill": (["ms", "update_ms"], 2),
    "e2e": (["prefill_ms", "decode_ms", "total_ms"], 2),
}


def invoke(*args: str):
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})


@pytest.mark.parametrize("benchmark", NAMES)
def test_command_prints_a_table_and_writes_every_raw_time(benchmark, tmp_path):
    path = tmp_path / "out.json"
    done = invoke("bench", benchmark, *FLAGS, "--tokens", "65,150", "--threads", "1", "--seed", "3", "--json", path)
    assert done.exit_code == 0, done.output
    data = json.loads(path.read_text())
    assert list(data) == ["benchmark", "environment", "settings", "results"]
    assert data["environment"]["torch"] == torch.__version__ and data["environment"]["threads"] == 1
    assert data["settings"]["tokens"] == [65, 150] and data["settings"]["seed"] == 3
    assert [(r["dtype"], r["tokens"]) for r in data["results"]] == [(d, t) for d in ("fp32", "bf16") for t in (65, 150)]
    assert data["settings"]["kernel"] == "auto" and "kernel: auto" in done.output
    figures, samples = RAW[benchmark]
    for result in data["results"]:
        assert list(result["columns"]) == NAMES[benchmark]
        assert 0 <= result["error"] <= columns.TOLERANCE[result["dtype"]]
        for label, column in result["columns"].items():
            assert (column["kernel"] == "sdpa") == label.startswith("stock") and column["kernel"] in done.output
            for name in figures:
                times = column[name]
                assert len(times["raw_ms"]) == samples and min(times["raw_ms"]) > 0
                assert times["low_ms"] <= times["median_ms"] <= times["high_ms"]
    for word in (*NAMES[benchmark], "fp32", "bf16", "transformers", "malloc", "1 thread of", "head_dim 16", "2 rounds"):
        assert word in done.output
    assert "goal" not in done.output


def test_decode_counts_the_bytes_that_are_kept():
    result = decode.run(replace(TINY, tokens=(150,), dtypes=("bf16",)))[0]
    seen = 150 + 1 + TINY.rounds * TINY.steps
    per_token = 2 * TINY.head_dim * 2  # k and v of one KV head in bfloat16
    kept = {name: column["kept_bytes_per_layer"] for name, column in result["columns"].items()}
    assert kept["stock"] == kept["stock static"] == kept["all retrieval"] == 4 * seen * per_token
    assert kept["half streaming"] == (2 * seen + 2 * (4 + 16)) * per_token
    assert all(layer.count("S") == 2 for layer in result["roles"])


@pytest.mark.parametrize("run", [decode.run, prefill.run, e2e.run])
@pytest.mark.parametrize("word", ["cpu", "reference", "stock"])
def test_the_kernel_that_is_asked_for_runs_and_is_named(word, run):
    settings = replace(TINY, tokens=(150,), dtypes=("fp32",), kernel=word, densities=(50,), density=60)
    (result,) = run(settings)
    named = {name: column["kernel"] for name, column in result["columns"].items()}
    assert named.pop("stock") == named.pop("stock static", "sdpa") == "sdpa" and len(named) > 1
    if word == "stock":  # Transformers' own call where it can be made
        assert named.pop("all retrieval") == "stock"
        assert all(set(name.split("+")) - {"stock"} for name in named.values())
    else:
        assert set(named.values()) == {word}


@pytest.mark.parametrize("run", [decode.run, prefill.run, e2e.run])
def test_a_kernel_that_cannot_run_here_is_an_error(run, monkeypatch):
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedModeError, match="kernel 'triton' does not compute"):
        run(replace(TINY, kernel="triton"))


@pytest.mark.parametrize("run", [decode.run, prefill.run, e2e.run])
def test_a_wrong_window_is_caught_before_anything_is_timed(run, monkeypatch):
    streaming_answer, patch = columns.streaming_answer, columns.patch

    def other_rule(q, k, v, at, settings):
        return streaming_answer(q, k, v, at, replace(settings, recent=settings.recent - 1))

    def narrow(model, settings, **how):  # e2e has no reference, but equals stock inside of the window
        return patch(model, replace(settings, recent=settings.recent - 1), **how)

    for module in (decode, prefill):
        monkeypatch.setattr(module, "streaming_answer", other_rule)
    monkeypatch.setattr(e2e, "patch", narrow)
    monkeypatch.setattr(e2e, "turns", lambda *args: pytest.fail("timed columns that differ"))
    monkeypatch.setattr(decode, "turns", lambda *args: pytest.fail("timed columns that differ"))
    monkeypatch.setattr(prefill, "turns", lambda *args: pytest.fail("timed columns that differ"))
    monkeypatch.setitem(columns.TOLERANCE, "fp32", 1e-5)
    with pytest.raises(LongCtxError, match="do not compute the same"):
        run(replace(TINY, dtypes=("fp32",)))


@pytest.mark.parametrize("run", [decode.run, prefill.run, e2e.run])
def test_a_wrong_retrieval_column_is_caught(run, monkeypatch):
    update = LongCtxCache.update
    monkeypatch.setattr(
        LongCtxCache, "update", lambda cache, k, v, layer_idx, *a, **kw: update(cache, k, -v, layer_idx)
    )
    with pytest.raises(LongCtxError, match="all retrieval"):
        run(replace(TINY, dtypes=("fp32",)))


@pytest.mark.parametrize("wrong", ["list_answer", "attend"])
def test_a_wrong_block_list_is_caught_before_anything_is_timed(wrong, monkeypatch):
    other = block_lists.random_list(300, 4, 0.8, seed=9)
    if wrong == "attend":
        change_attend(monkeypatch, cpu, BlockList, lambda q, segments, reads: (q, segments, other))
    else:
        monkeypatch.setattr(prefill, "list_answer", lambda q, k, v, at, _: list_answer(q, k, v, at, other))
    monkeypatch.setattr(prefill, "turns", lambda *args: pytest.fail("timed columns that differ"))
    with pytest.raises(LongCtxError, match="blocks 80% differs"):
        prefill.run(replace(TINY, tokens=(300,), dtypes=("fp32",), densities=(80,), kernel="cpu"))


def test_random_lists_have_the_density_they_are_asked_for():
    for density in (10, 20, 30, 100):
        made = block_lists.random_list(8192, 4, density / 100, seed=0)
        assert abs(made.density - density / 100) < 0.005
        mask = made.block_mask()
        assert mask[..., 0].all() and mask.diagonal(dim1=2, dim2=3).all()
        assert density == 100 or not torch.equal(mask[:, 0], mask[:, 1])
    least = block_lists.random_list(500, 1, 0.01, seed=0)
    assert least.counts.sum() == 2 * 8 - 1 and least.density == 15 / 36


def test_prefill_without_block_lists_and_with_their_density():
    result = prefill.run(replace(TINY, tokens=(300,), dtypes=("fp32",), densities=()))[0]
    assert list(result["columns"]) == NAMES["prefill"][:3]
    result = prefill.run(replace(TINY, tokens=(300,), dtypes=("fp32",), densities=(60,), kernel="cpu"))[0]
    column = result["columns"]["blocks 60%"]
    assert column["density"] == block_lists.random_list(300, 4, 0.6, TINY.seed).density < 1
    assert column["kernel"] == "cpu"
    printed = io.StringIO()
    show.show(Console(width=250, file=printed), show.as_json("prefill", TINY, [result]))
    share = column["density"] * result["columns"]["stock"]["ms"]["median_ms"] / column["ms"]["median_ms"]
    assert f"{share:.0%} ({column['density']:.1%})" in printed.getvalue()


def test_the_columns_are_what_their_names_say():
    stock, half = (columns.Column.of(TINY, torch.float32, roles) for roles in (None, TINY.half_streaming()))
    assert type(stock.cache).__name__ == "DynamicCache" and isinstance(half.cache, LongCtxCache)
    assert stock.model.config._attn_implementation == "sdpa"
    assert half.model.base_model.longctx_state.config.stores.streaming.recent == 16


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--kv-heads", "1"], "kv_heads must be at least 2"),
        (["--kv-heads", "3"], "kv_heads must divide heads"),
        (["--dtype", "fp8"], "dtype fp8 is not known; known: fp32, bf16"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--tokens", ""], "tokens must be lengths"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--densities", "10,0"], "densities must be percents from 1 to 100, given [10, 0]"),
        (["--kernel", "cppu"], "kernel: got 'cppu', expected one of: auto, stock, cpu,"),
        (["--patterns", "vertical_slahs"], "Did you mean 'vertical_slash'?"),
        (["--patterns", "block_topk:topk=3"], "patterns[0].topk: unknown key"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(args, message):
    done = invoke("bench", "prefill", *args)
    assert done.exit_code == 2
    assert message in done.stderr and "Traceback" not in done.output
    (line,) = [line for line in done.stderr.splitlines() if line != "bench prefill: started, 0 of 12 rounds"]
    assert line.startswith(ConfigError.__name__)


@pytest.mark.parametrize("args", [["--tokens", "8x"], ["--json", "x.txt"]])
def test_bad_options_are_refused(args):
    assert invoke("bench", "decode", *args).exit_code == 2


def test_tuned_malloc_runs_the_same_command_again_once(monkeypatch):
    calls = []

    def execve(path, argv, env):
        calls.append((path, argv, env))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", execve)
    for name in environment.TUNED:
        monkeypatch.delenv(name, raising=False)
    assert environment.malloc() == "not tuned"
    assert invoke("bench", "decode", *FLAGS, "--tokens", "65", "--tuned-malloc").exit_code == 0
    (path, argv, env) = calls[0]
    assert path == sys.executable and argv[1:] == sys.orig_argv[1:]
    for name, value in environment.TUNED.items():
        assert env[name] == value
        monkeypatch.setenv(name, value)
    assert environment.malloc().startswith("tuned (MALLOC_MMAP_MAX_=0")
    assert invoke("bench", "decode", *FLAGS, "--tokens", "65", "--dtype", "fp32", "--tuned-malloc").exit_code == 0
    assert len(calls) == 1


def test_columns_take_turns_and_ratios_pair_rounds():
    told = []
    order = list(turns({"a": 0, "b": 0, "c": 0}, 2, 64, told.append))
    assert order == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a")]
    assert told == [64, 64], "after every round"
    assert paired_ratio(Samples([1.0, 20.0, 3.0]), Samples([1.0, 10.0, 1.0])) == 2.0
    assert Samples([3.0, 1.0, 2.0]).spread == (1.0, 3.0)
    assert Samples([float(i) for i in range(20)]).spread == (2.0, 17.0)
