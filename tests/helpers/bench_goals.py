"""The goals of this version, stated for the default sizes, and how far the figures of a benchmark's JSON are from them.

``python tests/helpers/bench_goals.py out.json`` prints a line per goal of what ``hf-longctx bench ... --json`` wrote.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_longctx.bench import gpu
from hf_longctx.bench.block_lists import name_of
from hf_longctx.bench.columns import HALF, RETRIEVAL, STOCK, STREAMING, sparse_name
from hf_longctx.bench.gpu_settings import GpuSettings
from hf_longctx.bench.settings import LONG, Settings, default_layers

TORCH, NATIVE = "cpu", "native"  # the kernels that goals are stated for
FASTER = {"fp32": 3.0, "bf16": 6.0}  # decode, all retrieval against stock
PURE = 1.7  # decode, half streaming against all retrieval
SHARE = {  # decode, speed of reading as a share of the speed of summing
    TORCH: {"fp32": 0.22, "bf16": 0.18},
    NATIVE: {"fp32": 0.35, "bf16": 0.35},
}
PREFILL = {8192: 7.0, LONG: 20.0}  # streaming heads against dense
LISTS = {TORCH: {"fp32": 0.65}, NATIVE: {"fp32": 0.95, "bf16": 1.5}}  # block lists, as a share of 1 / density
CHOOSING = {  # choosing with a pattern's defaults, time against stock's dense attention
    "vertical_slash": {8192: 0.045, LONG: 0.017},
    "block_topk": {8192: 0.03, LONG: 0.015},
}
WHOLE = 1.05  # whole model, short prompts, time against stock
SPARSE = 20  # percent of the blocks for which the next line is stated
WHOLE_LONG = {TORCH: {"fp32": 1.6, "bf16": 2.4}, NATIVE: {"fp32": 1.8, "bf16": 2.7}}  # whole model, long prompt

LONG_ON_GPU = 65536  # tokens from which on the goal of prompts holds
OF_IDEAL = 80.0  # % of 1 / density, and of the ratio of the cached bytes
OF_BANDWIDTH = 60.0  # %, decoding


@dataclass(frozen=True)
class Goal:
    """One goal and what was measured, in the unit of the goal.

    Attributes:
        unit: "x" for how many times faster, "%" for a share of what is possible, "% of ..." for any other share.
        at_most: the goal is an upper bound.
    """

    text: str
    goal: float
    measured: float
    unit: str = "x"
    at_most: bool = False

    @property
    def possible(self) -> bool:
        """Nothing reads faster than the sum does: a higher share means that the machine was busy elsewhere."""
        return self.unit != "%" or self.measured <= 100

    @property
    def reached(self) -> bool:
        if not self.possible:
            return False
        return self.measured <= self.goal if self.at_most else self.measured >= self.goal

    def verdict(self) -> str:
        """``reached`` with the figure, ``short by`` how much, or why it means nothing."""
        digits = 2 if self.unit == "x" else 1
        measured, goal = (f"{number:.{digits}f}{self.unit}" for number in (self.measured, self.goal))
        if not self.possible:
            return f"not measured: {measured} is impossible, the machine was busy with something else (goal {goal})"
        if self.reached:
            return f"reached: {measured} ({'at most' if self.at_most else 'goal'} {goal})"
        return f"short by {abs(self.goal - self.measured):.{digits}f}{self.unit[0]}: {measured} (goal {goal})"


def goals(data: dict) -> list[Goal]:
    """The goals that the JSON of a benchmark speaks to; none for another shape, or where a kernel without goals ran."""
    if data["benchmark"] == "gpu":
        return _gpu(data)
    makers = {"decode": _decode, "prefill": _prefill, "e2e": _whole}
    if data["benchmark"] not in makers or not default_shape(data):
        return []
    return [goal for result in data["results"] for goal in makers[data["benchmark"]](result)]


def default_shape(data: dict) -> bool:
    """Whether a shape is the one the goals are stated for."""
    if data["benchmark"] == "gpu":
        default = GpuSettings().as_dict()
        names = ("heads", "kv_heads", "head_dim", "sink", "recent", "dtypes")
    else:
        tokens = tuple(data["settings"]["tokens"])
        default = Settings(tokens, layers=default_layers(data["benchmark"], tokens)).as_dict()
        names = ("layers", "heads", "kv_heads", "head_dim", "sink", "recent")
    plain = json.loads(json.dumps([data["settings"], default]))
    return all(plain[0][name] == plain[1][name] for name in names)


def _gpu(data: dict) -> list[Goal]:
    if not default_shape(data):
        return []
    kernel = data["settings"]["kernels"][0]
    bandwidth = data["environment"]["gb_per_s"]
    return [goal for result in data["results"] for goal in goals_on_gpu(result, kernel, bandwidth)]


def goals_on_gpu(result: dict, kernel: str, gb_per_s: float) -> Iterator[Goal]:
    """The goals of one result, for what reads less than everything by this kernel."""
    best = result["columns"][result["best_dense"]]["ms"]["median_ms"]
    where = f"{result['case']} {result['dtype']} at {result['tokens']}"
    for name, column in result["columns"].items():
        if column["kernel"] != kernel or column["density"] == 1 or column["reads"] == gpu.STREAMING:
            continue
        share = 100 * column["density"] * best / column["ms"]["median_ms"]
        text = f"{where}: {name} faster than {result['best_dense']}"
        if result["case"] == "decode":
            yield Goal(text, OF_IDEAL, share, "% of the ratio of bytes")
            text = f"{where}: {name} reads at a share of the bandwidth"
            yield Goal(text, OF_BANDWIDTH, 100 * column["gb_per_s"] / gb_per_s, "%")
        elif result["tokens"] >= LONG_ON_GPU:
            yield Goal(text, OF_IDEAL, share, "% of 1/density")


def _where(benchmark: str, result: dict, column: str) -> str:
    """Benchmark, dtype, length, and the kernel of the column the goal is about."""
    return f"{benchmark} {result['dtype']} at {result['tokens']}, kernel {_kernel(result, column)}"


def _kernel(result: dict, column: str) -> str:
    return result["columns"][column]["kernel"]


def _decode(result: dict) -> Iterator[Goal]:
    word, columns = result["dtype"], result["columns"]
    share = SHARE.get(_kernel(result, RETRIEVAL))
    if result["tokens"] != LONG or share is None:
        return
    ms = {name: column["ms_per_layer"]["median_ms"] for name, column in columns.items()}
    where = _where("decode", result, RETRIEVAL)
    yield Goal(f"{where}: {RETRIEVAL} faster than stock", FASTER[word], ms[STOCK] / ms[RETRIEVAL])
    yield Goal(f"{where}: {HALF} faster than {RETRIEVAL}", PURE, ms[RETRIEVAL] / ms[HALF])
    for name in (RETRIEVAL, HALF):
        measured = 100 * columns[name]["share_of_sum"]
        yield Goal(f"{where}: {name} reads at a share of the summing speed", 100 * share[word], measured, "%")


def _prefill(result: dict) -> Iterator[Goal]:
    word, tokens, columns = result["dtype"], result["tokens"], result["columns"]
    ms = {name: column["ms"]["median_ms"] for name, column in columns.items()}
    if tokens not in PREFILL:
        return
    if _kernel(result, STREAMING) in (TORCH, NATIVE):
        text = f"{_where('prefill', result, STREAMING)}: streaming heads faster than stock's dense"
        yield Goal(text, PREFILL[tokens], ms[STOCK] / ms[STREAMING])
    for name in map(name_of, Settings.densities):
        goal = LISTS.get(_kernel(result, name), {}).get(word) if name in columns else None
        if goal is not None:
            text = f"{_where('prefill', result, name)}: {name} faster than stock's dense"
            yield Goal(text, 100 * goal, 100 * columns[name]["density"] * ms[STOCK] / ms[name], "% of 1/density")
    for name, pattern in result["patterns"].items():
        goal = CHOOSING.get(name, {}).get(tokens)
        if goal is not None:
            text = f"prefill {word} at {tokens}: choosing with {name}"
            measured = 100 * pattern["share_of_stock"]
            yield Goal(text, 100 * goal, measured, "% of stock's dense time", at_most=True)


def _whole(result: dict) -> Iterator[Goal]:
    columns = result["columns"]
    if result["tokens"] in (512, 1024):
        for name in (RETRIEVAL, HALF, STREAMING):
            if _kernel(result, name) in (TORCH, NATIVE):
                text = f"{_where('whole model', result, name)}: {name}, prompt to logits and one token"
                yield Goal(text, 100 * WHOLE, 100 * columns[name]["total_ratio"], "% of stock's time", at_most=True)
    name = sparse_name(SPARSE)
    if result["tokens"] == LONG and name in columns:
        goal = WHOLE_LONG.get(_kernel(result, name), {}).get(result["dtype"])
        if goal is not None:
            text = (
                f"{_where('whole model', result, name)}: {name} (read {columns[name]['density']:.1%}), prompt to logits"
            )
            yield Goal(f"{text}, faster than stock", goal, 1 / columns[name]["prefill_ratio"])


if __name__ == "__main__":
    for goal in goals(json.loads(Path(sys.argv[1]).read_text("utf-8"))):
        sys.stdout.write(f"{goal.text}: {goal.verdict()}\n")
