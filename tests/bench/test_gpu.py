"""``hf-longctx bench gpu`` without a GPU: what it computes, refuses and says. The clock is a stopwatch or made up."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from hf_longctx import ConfigError, LongCtxError
from hf_longctx.bench import columns, gpu, gpu_clock, gpu_show
from hf_longctx.bench.gpu_settings import GpuSettings
from hf_longctx.commands._app import app
from hf_longctx.kernels import cpu, reference
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.reads import All, Window

CPU = torch.device("cpu")
SHAPE = {"heads": 8, "kv_heads": 4, "head_dim": 16, "sink": 4, "recent": 16, "rounds": 2}
SIZES = {"tokens": (600,), "decode_tokens": (150,), "densities": (40, 80), "kernels": ("cpu", "flash")}
TINY = GpuSettings(**SIZES, **SHAPE)
DENSE = ["SDPA flash"]  # of the three, what a processor has
PREFILL = [*DENSE, "cpu streaming", "cpu blocks 40%", "cpu blocks 80%"]
DECODE = [*DENSE, "SDPA flash, group folded", "cpu 100% retrieval", "cpu 25% retrieval", "cpu 50% retrieval"]


def stopwatch(work) -> float:
    begin = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - begin)


def never(work) -> float:
    pytest.fail("timed what is wrong")


def invoke(*args: str):
    return CliRunner().invoke(app, ["bench", "gpu", *map(str, args)], env={"COLUMNS": "250"})


def test_without_a_gpu_it_refuses_and_says_what_measures_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = invoke()
    assert done.exit_code == 2
    assert "bench gpu needs a CUDA device, and torch sees none. hf-longctx bench decode, prefill and e2e" in done.stderr


@pytest.mark.parametrize("word", ["bf16", "fp32"])
def test_every_way_is_checked_and_timed_as_often_as_told(word):
    calls = []

    def clock(work):
        calls.append(work)
        return stopwatch(work)

    prefill, decode = gpu.run(replace(TINY, dtypes=(word,)), CPU, clock)
    assert [prefill["case"], prefill["tokens"], decode["case"], decode["tokens"]] == ["prefill", 600, "decode", 150]
    assert [list(one["columns"]) for one in (prefill, decode)] == [PREFILL, DECODE]
    assert len(calls) == TINY.rounds * (len(PREFILL) + len(DECODE))
    for result in (prefill, decode):
        assert 0 < result["error"] <= columns.TOLERANCE[word]
        assert result["best_dense"] in ("SDPA flash", "SDPA flash, group folded")
        for column in result["columns"].values():
            assert len(column["ms"]["raw_ms"]) == TINY.rounds and min(column["ms"]["raw_ms"]) > 0
        assert "needs a CUDA device, not cpu" in result["not_measured"]["flash-attn"]
        assert {"SDPA cuDNN"} <= set(result["not_measured"])
    assert "flash: computes no BlockList" in prefill["not_measured"]["flash blocks"]


def test_the_work_of_a_column_is_what_its_name_says():
    prefill, decode = gpu.run(TINY, CPU, stopwatch)
    kept = {name: column["kept_bytes"] for name, column in decode["columns"].items()}
    per_token = 2 * TINY.head_dim * 2  # k and v of one KV head in bfloat16
    whole, window = 151 * per_token, (TINY.sink + TINY.recent) * per_token
    assert kept["SDPA flash"] == kept["cpu 100% retrieval"] == 4 * whole
    assert kept["cpu 25% retrieval"] == whole + 3 * window
    assert kept["cpu 50% retrieval"] == 2 * whole + 2 * window
    for name, column in decode["columns"].items():
        assert column["density"] == kept[name] / (4 * whole)
        assert column["gb_per_s"] == pytest.approx(kept[name] / column["ms"]["median_ms"] / 1e6)
    density = {name: column["density"] for name, column in prefill["columns"].items()}
    window = sum(min(i + 1, TINY.sink + TINY.recent) for i in range(600))
    assert density["cpu streaming"] == window / (600 * 601 // 2)
    assert density["cpu blocks 40%"] < density["cpu blocks 80%"] < density["SDPA flash"] == 1
    assert TINY.roles(25) == ["RSSS"] and TINY.roles(50) == ["RSRS"] and TINY.roles(100) == ["RRRR"]


def test_a_patched_model_decodes_by_the_kernel_of_its_column(monkeypatch):
    ran = []
    for module in (cpu, reference):
        attend = module.attend

        def noted(q, segments, reads, *args, attend=attend, name=module.NAME, **kwargs):
            if isinstance(reads, All):
                ran.append(name)
            return attend(q, segments, reads, *args, **kwargs)

        monkeypatch.setattr(module, "attend", noted)
    gpu.run(replace(TINY, kernels=("reference",), rounds=1), CPU, stopwatch)
    assert set(ran) == {"reference", "cpu"}  # cpu: the folded dense way
    # Once for the check and once for the clock: one role at 100 %, two at 25 % and at 50 %.
    assert ran.count("reference") == 2 * (1 + 2 + 2)


def test_what_a_kernel_leaves_to_others_is_not_measured_twice():
    prefill, decode = gpu.run(replace(TINY, kernels=("cpu", "flex"), densities=()), CPU, stopwatch)
    assert "flex: computes no Window" in prefill["not_measured"]["flex streaming"]
    assert "flex: computes no All" in decode["not_measured"]["flex decode"]
    assert [*prefill["columns"], *decode["columns"]] == [*PREFILL[:2], *DECODE]


@pytest.mark.parametrize(
    ("kind", "message"),
    [(BlockList, "cpu blocks 40% differs"), (Window, "cpu streaming differs"), (All, "group folded differs")],
)
def test_a_wrong_kernel_is_caught_before_it_is_timed(kind, message, monkeypatch):
    right = cpu.attend

    def late_queries_off(q, segments, reads, *args, **kwargs):
        out, lse = right(q, segments, reads, *args, **kwargs)
        if isinstance(reads, kind):
            out = out.clone()
            out[:, :, -1] *= 1.2  # of the largest value of a prompt, which is that of its first query, this is nothing
        return out, lse

    monkeypatch.setattr(cpu, "attend", late_queries_off)
    with pytest.raises(LongCtxError, match=message):
        gpu.run(replace(TINY, tokens=(600,), dtypes=("fp32",)), CPU, never if kind is not All else stopwatch)


def test_without_any_dense_attention_nothing_is_compared(monkeypatch):
    def refuse(*args):
        raise RuntimeError("No available kernel.")

    monkeypatch.setattr(gpu, "sdpa_kernel", refuse)
    with pytest.raises(LongCtxError, match="no dense attention could be measured.*No available kernel"):
        gpu.run(TINY, CPU, never)


def test_what_does_not_fit_is_named(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(cpu, "attend", full)
    with pytest.raises(LongCtxError, match="600 tokens do not fit on the device .*--tokens and --decode-tokens"):
        gpu.run(TINY, CPU, stopwatch)


def test_the_goals_are_shares_of_what_is_possible(monkeypatch):
    """By a clock that gives every call half the time of the one before."""
    numbers = itertools.count()
    settings = replace(TINY, rounds=1)
    prefill, decode = gpu.run(settings, CPU, lambda work: work() is not None and 2.0 ** -next(numbers))
    assert [column["ms"]["median_ms"] for column in prefill["columns"].values()] == [1, 0.5, 0.25, 0.125]
    assert not list(gpu_show.goals_of(prefill, "cpu", 1.0)), "too short a prompt"
    monkeypatch.setattr(gpu_show, "LONG", 600)
    made = list(gpu_show.goals_of(prefill, "cpu", 1.0))
    assert [goal.text for goal in made] == [
        f"prefill bf16 at 600: cpu blocks {n}% faster than SDPA flash" for n in (40, 80)
    ]
    for goal, faster in zip(made, (4, 8), strict=True):
        density = prefill["columns"][goal.text.split(": ")[1].split(" faster")[0]]["density"]
        assert (goal.measured, goal.goal, goal.reached) == (100 * density * faster, 80, 100 * density * faster >= 80)
    made = list(gpu_show.goals_of(decode, "cpu", 1.0))
    column, dense = decode["columns"]["cpu 25% retrieval"], decode["columns"]["SDPA flash, group folded"]["ms"]
    assert [(goal.unit, goal.goal) for goal in made] == [("% of the ratio of bytes", 80), ("%", 60)] * 2
    assert made[0].measured == 100 * column["density"] * dense["median_ms"] / column["ms"]["median_ms"]
    assert made[1].measured == 100 * column["gb_per_s"]
    assert not list(gpu_show.goals_of(decode, "flash", 1.0)), "another kernel's"


def test_goals_belong_to_the_default_shape():
    results = gpu.run(TINY, CPU, stopwatch)
    own = {name: getattr(GpuSettings(), name) for name in SHAPE}
    assert gpu_show.goals(TINY, results, 1.0) == []
    stated = replace(TINY, **own)
    assert len(gpu_show.goals(stated, results, 1.0)) == 4
    for change in ({"heads": 64}, {"kv_heads": 16}, {"head_dim": 64}, {"sink": 0}, {"recent": 128}):
        assert not replace(stated, **change).stated
    assert GpuSettings().stated
    assert GpuSettings().tokens == (16384, 32768, 65536, 131072)
    assert GpuSettings().decode_tokens == (32768, 131072, 524288, 1048576)
    assert GpuSettings().roles(25) == ["RSSSRSSS"]


def test_command_prints_a_table_and_writes_every_raw_time(tmp_path, monkeypatch):
    """On the processor: the command runs but for the device that is asked for."""

    def on_the_processor(settings, told):
        buffer = torch.zeros(1 << 18)
        return gpu.run(settings, CPU, stopwatch, told), gpu_clock.bandwidth(stopwatch, buffer)

    monkeypatch.setattr(gpu, "bench", on_the_processor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path, flags = tmp_path / "out.json", []
    for name, value in (SHAPE | SIZES).items():
        flags += [f"--{name.replace('_', '-')}", ",".join(map(str, value)) if isinstance(value, tuple) else value]
    done = invoke(*flags, "--seed", "3", "--json", path)
    assert done.exit_code == 0, done.output
    data = json.loads(path.read_text())
    assert list(data) == ["benchmark", "environment", "settings", "results", "goals"]
    assert data["benchmark"] == "gpu" and data["goals"] == []
    assert data["settings"] == json.loads(json.dumps(replace(TINY, seed=3).as_dict()))
    assert data["environment"]["gb_per_s"] > 0 and data["environment"]["torch"] == torch.__version__
    assert [list(result["columns"]) for result in data["results"]] == [PREFILL, DECODE]
    for name in (*gpu_show.HEADER, *PREFILL, *DECODE, "head_dim 16", "2 rounds", "no GPU", "Not measured: flash-attn"):
        assert name in done.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernels": ("tritn",)}, "kernel tritn is not known; known: cpu, flash, flex"),
        ({"kernels": ()}, r"kernel \(none\)"),
        ({"retrieval": (100,)}, r"retrieval must be percents from 1 to 99, given \[100\]"),
        ({"decode_tokens": ()}, "decode_tokens must be lengths"),
        ({"densities": (0,)}, "densities must be percents"),
        ({"kv_heads": 3}, "kv_heads must divide heads"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize("args", [["--tokens", "8x"], ["--json", "/no/such/folder/x.json"]])
def test_bad_options_are_refused(args):
    assert invoke(*args).exit_code == 2
