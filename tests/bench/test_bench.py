"""``hf-longctx bench``: the columns compute the same, and JSON and terminal say what was measured. No timing."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from hf_longctx import ConfigError, LongCtxCache, LongCtxError
from hf_longctx.bench import block_lists, columns, decode, e2e, environment, goals, prefill, show
from hf_longctx.bench.measure import Samples, paired_ratio, turns
from hf_longctx.bench.settings import Settings
from hf_longctx.cli import app
from hf_longctx.kernels import native

SHAPE = {"layers": 2, "heads": 8, "kv_heads": 4, "head_dim": 16, "sink": 4, "recent": 16, "rounds": 2}
TINY = Settings((65, 150), **SHAPE)
FLAGS = [part for name, value in SHAPE.items() for part in (f"--{name.replace('_', '-')}", str(value))]
NAMES = {
    "decode": ["stock", "all retrieval", "half streaming"],
    "prefill": ["stock", "all retrieval", "all streaming", "blocks 10%", "blocks 20%", "blocks 30%"],
    "e2e": ["stock", "all retrieval", "half streaming", "all streaming"],
}
sparse_prefill, list_answer = native.sparse_prefill, block_lists.list_answer
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
    assert list(data) == ["benchmark", "environment", "settings", "results", "goals"]
    assert data["environment"]["torch"] == torch.__version__ and data["environment"]["threads"] == 1
    assert data["settings"]["tokens"] == [65, 150] and data["settings"]["seed"] == 3
    assert [(r["dtype"], r["tokens"]) for r in data["results"]] == [(d, t) for d in ("fp32", "bf16") for t in (65, 150)]
    figures, samples = RAW[benchmark]
    for result in data["results"]:
        assert list(result["columns"]) == NAMES[benchmark]
        assert 0 <= result["error"] <= columns.TOLERANCE[result["dtype"]]
        for column in result["columns"].values():
            for name in figures:
                times = column[name]
                assert len(times["raw_ms"]) == samples and min(times["raw_ms"]) > 0
                assert times["low_ms"] <= times["median_ms"] <= times["high_ms"]
    for word in (*NAMES[benchmark], "fp32", "bf16", "transformers", "malloc", "1 threads", "head_dim 16", "2 rounds"):
        assert word in done.output
    assert data["goals"] == [] and "goal" not in done.output


def test_decode_counts_the_bytes_that_are_kept():
    result = decode.run(replace(TINY, tokens=(150,), dtypes=("bf16",)))[0]
    seen = 150 + 1 + TINY.rounds * TINY.steps
    per_token = 2 * TINY.head_dim * 2  # k and v of one KV head in bfloat16
    kept = {name: column["kept_bytes_per_layer"] for name, column in result["columns"].items()}
    assert kept["stock"] == kept["all retrieval"] == 4 * seen * per_token
    assert kept["half streaming"] == (2 * seen + 2 * (4 + 16)) * per_token
    assert all(layer.count("S") == 2 for layer in result["roles"])


@pytest.mark.parametrize("run", [decode.run, prefill.run, e2e.run])
def test_a_wrong_window_is_caught_before_anything_is_timed(run, monkeypatch):
    streaming_answer, patch = columns.streaming_answer, columns.patch

    def other_rule(q, k, v, at, settings):
        return streaming_answer(q, k, v, at, replace(settings, recent=settings.recent - 1))

    def narrow(model, settings, roles):  # e2e has no reference, but equals stock inside of the window
        return patch(model, replace(settings, recent=settings.recent - 1), roles)

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
        monkeypatch.setattr(native, "sparse_prefill", lambda q, k, v, _, scale: sparse_prefill(q, k, v, other, scale))
    else:
        monkeypatch.setattr(prefill, "list_answer", lambda q, k, v, at, _: list_answer(q, k, v, at, other))
    monkeypatch.setattr(prefill, "turns", lambda *args: pytest.fail("timed columns that differ"))
    with pytest.raises(LongCtxError, match="blocks 80% differs"):
        prefill.run(replace(TINY, tokens=(300,), dtypes=("fp32",), densities=(80,)))


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
    result = prefill.run(replace(TINY, tokens=(300,), dtypes=("fp32",), densities=(60,)))[0]
    column = result["columns"]["blocks 60%"]
    assert column["density"] == block_lists.random_list(300, 4, 0.6, TINY.seed).density < 1
    assert column["kernel"] == "native"
    printed = io.StringIO()
    show.show(Console(width=250, file=printed), show.as_json("prefill", TINY, [result]))
    share = column["density"] * result["columns"]["stock"]["ms"]["median_ms"] / column["ms"]["median_ms"]
    assert f"{share:.0%} ({column['density']:.1%})" in printed.getvalue()


def test_the_goal_of_block_lists_is_a_share_of_what_their_density_allows():
    results = fake_results("prefill", (8192,))
    made = {goal.text: goal for goal in goals.goals("prefill", Settings((8192,)), results)}
    found = [made[f"prefill fp32 at 8192: blocks {n}% faster than stock's dense"] for n in (10, 20, 30)]
    assert [round(goal.measured) for goal in found] == [80, 160, 320]  # 8, 16 and 32 times faster at a density of 0.1
    assert all(goal.reached and goal.goal == 65 for goal in found)
    assert found[0].verdict() == "reached: 80.0% of 1/density (goal 65.0% of 1/density)"
    assert not any("bf16" in text and "blocks" in text for text in made)


def test_the_columns_are_what_their_names_say():
    stock, half = (columns.Column.of(TINY, torch.float32, roles) for roles in (None, TINY.half_streaming()))
    assert type(stock.cache).__name__ == "DynamicCache" and isinstance(half.cache, LongCtxCache)
    assert stock.model.config._attn_implementation == "sdpa"
    assert half.model.base_model.longctx_state.config.stores.streaming.recent == 16


def fake_results(benchmark: str, tokens: tuple[int, ...]) -> list[dict]:
    """Results of round figures: stock 100 ms, every next column half of it."""
    results = []
    for word in ("fp32", "bf16"):
        for count in tokens:
            made = {}
            for i, name in enumerate(NAMES[benchmark]):
                times = Samples([100 / 2**i]).as_dict()
                made[name] = dict.fromkeys(RAW[benchmark][0], times)
                made[name] |= {f"{part}_ratio": 2.0**-i for part in ("prefill", "decode", "total")}
                made[name] |= {"density": 0.1} if name.startswith("blocks") else {}
                made[name] |= {"share_of_sum": 0.2, "kept_bytes_per_layer": 10**6, "gb_per_s": 1.0, "sum_gb_per_s": 5.0}
            results.append({"dtype": word, "tokens": count, "heads": 1, "kv_heads": 1, "error": 0.0, "columns": made})
    return results


@pytest.mark.parametrize(
    ("benchmark", "tokens", "count"), [("decode", (8192, 32768), 8), ("prefill", (8192, 32768), 4 + 6)]
)
def test_goals_belong_to_the_default_sizes(benchmark, tokens, count):
    results = fake_results(benchmark, tokens)
    assert len(goals.goals(benchmark, Settings(tokens), results)) == count
    for change in ({"heads": 64}, {"layers": 2}, {"recent": 128}, {"sink": 0}, {"head_dim": 128}, {"kv_heads": 16}):
        assert goals.goals(benchmark, replace(Settings(tokens), **change), results) == []
    assert goals.goals(benchmark, Settings((100,)), fake_results(benchmark, (100,))) == []


def test_every_goal_says_reached_or_by_how_much_it_is_short(capsys):
    settings = Settings((8192, 32768))
    data = show.as_json("decode", settings, fake_results("decode", settings.tokens), others=0.5)
    show.show(Console(width=250), data)
    printed = capsys.readouterr().out
    assert "decode fp32 at 32768: all retrieval faster than stock: short by 1.00x: 2.00x (goal 3.00x)" in printed
    assert "decode fp32 at 32768: half streaming faster than all retrieval: reached: 2.00x (goal 1.70x)" in printed
    assert "share of the summing speed: short by 2.0%: 20.0% (goal 22.0%)" in printed
    assert "share of the summing speed: reached: 20.0% (goal 18.0%)" in printed
    assert "Other processes took 50%" in printed
    assert len(goals.goals("e2e", Settings((512, 1024)), fake_results("e2e", (512, 1024)))) == 12
    slower = goals.Goal("", 105.0, 107.5, "% of stock's time", at_most=True)
    assert not slower.reached and slower.verdict().startswith("short by 2.5%: 107.5% of stock's time")
    assert not goals.Goal("", 22.0, 474.0, "%").reached  # faster than the speed of reading


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--kv-heads", "1"], "kv_heads must be at least 2"),
        (["--kv-heads", "3"], "kv_heads must divide heads"),
        (["--dtype", "fp8"], "dtype fp8 is not known; known: fp32, bf16"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--tokens", ""], "tokens must be lengths"),
        (["--threads", "0"], "threads >= 1"),
        (["--densities", "10,0"], "densities must be percents from 1 to 100, given [10, 0]"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(args, message):
    done = invoke("bench", "prefill", *args)
    assert done.exit_code == 2
    assert message in done.stderr and "Traceback" not in done.output
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith(ConfigError.__name__)


@pytest.mark.parametrize("args", [["--tokens", "8k"], ["--json", "/no/such/folder/x.json"]])
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
    order = list(turns({"a": 0, "b": 0, "c": 0}, 2))
    assert order == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a")]
    assert paired_ratio(Samples([1.0, 20.0, 3.0]), Samples([1.0, 10.0, 1.0])) == 2.0
    assert Samples([3.0, 1.0, 2.0]).spread == (1.0, 3.0)
    assert Samples([float(i) for i in range(20)]).spread == (2.0, 17.0)
