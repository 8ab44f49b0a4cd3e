"""The tables of the benchmarks, and the JSON that holds everything."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..io.console import count, tables
from . import kernels_table
from .columns import CONFIG, HALF, RETRIEVAL, STATIC, STOCK
from .environment import environment
from .measure import digits
from .settings import Settings

TITLES = {
    "decode": "attention + cache update of one token, per layer",
    "prefill": "attention of some heads of one layer over the prompt: dense, streaming, by block lists",
    "e2e": "whole model: prompt to logits and one decoded token",
    "real": "whole checkpoint: prompt to logits, and decoded tokens",
    "crossover": "attention of a layer's retrieval heads over a prompt: dense, and by their patterns",
    "crossover_decode": "a decoded token of retrieval heads, per layer: reading all, and a selection",
    "kernels": "kernel native against kernel cpu (torch), attention of one layer",
}
FLAT = ("crossover", "crossover_decode", "kernels")  # not grouped by case, and without stock
TEXTS = ("function", "dtype", "", "choosing with", "kernel", "wins")  # columns of words
QUIET = 0.05  # share of the processors that others may take before the figures are called bad
NOTES = {
    "decode": "Read at: kept K/V bytes over time, and as a share of the speed of torch.sum over the same buffers.",
    "prefill": "Only the KV heads that half streaming makes streaming (half of them, one layer), in every "
    "column. The cache update is not part of the attention time. blocks N% = random block lists, head by head, of "
    "N% of the causal blocks, which nobody had to choose. Of 1/density = vs stock, times the density in parentheses. "
    "Choosing: for the same heads, on random queries and keys that score near ones higher; density = what was listed.",
    "e2e": "Ratios are medians over rounds of patched / stock in the same round. The prompt gives the logits of its "
    "last token only. density = causal blocks that the retrieval heads read; choosing them is part of the time.",
    "real": "vs stock = times faster, medians over rounds of the same round. A prompt is one forward that gives the "
    "logits of its last token. A token ms is the mean of the tokens decoded per timing. KV MB (10^6 bytes) = what the "
    "cache holds after the last of them.",
    "crossover": "Both are the patched model, so that the gain is the patterns' alone; choosing the blocks is part of "
    "the sparse time. Queries and keys are random and score near ones higher: on a text, a pattern that looks at them "
    "may read more or less than this density. Wins = faster in every round (of 10 or more: in nine tenths).",
    "crossover_decode": "Attention and cache update of one decoded token, per layer, over caches with random keys and "
    "values, all of whose heads keep every token. Choosing and using a choice again are part of the time. Density = "
    "the cached tokens that the selection read. Wins = faster in every round (of 10 or more: in nine tenths).",
    "kernels": "Times faster = the median over rounds of torch and native in the same round. Block lists are random, "
    "head by head. 16 tokens are the last of so many. Decode is one token over several caches in turn, per cache. "
    "auto takes torch where a row of kernels/native_speed.json for this kind of machine is below 1.",
}


def as_json(
    benchmark: str,
    settings: Settings,
    results: list[dict],
    others: float | None = None,
    facts: Mapping[str, object] = MappingProxyType({}),
) -> dict:
    """Versions, settings, every figure and raw time, and the benchmark's own ``facts``.

    ``others`` is the share of the processors that other processes took meanwhile.
    """
    return {
        "benchmark": benchmark,
        "environment": {**environment(), "others": others},
        "settings": settings.as_dict(),
        "results": results,
        **facts,
    }


def show(console: Console, data: dict) -> None:
    """Print one benchmark's ``as_json``: a table, and what it ran on."""
    benchmark = data["benchmark"]
    e = data["environment"]
    s = data["settings"]
    for number, rows in enumerate(TABLES[benchmark]):
        header, *lines = rows(data["results"])
        if lines:
            title = None if number else f"bench {benchmark}: {TITLES[benchmark]}"
            _print_tables(console, title, header, lines, by_case=benchmark not in FLAT)
    spread = "" if benchmark in ("real", "kernels") else " (10th to 90th percentile)"
    rounds = count(s["rounds"], "round")
    console.print(
        f"{escape(subject(data))}{count(s['layers'], 'layer')}, {s['heads']} query heads, {s['kv_heads']} KV heads, "
        f"head_dim {kernels_table.joined(s['head_dim'])}{_sizes(benchmark, s)}; kernel: {s['kernel']}; {rounds}, "
        f"columns in turns; median{spread}."
    )
    console.print(
        f"torch {e['torch']}, transformers {e['transformers']}, Python {e['python']}, hf_longctx {e['hf_longctx']}; "
        f"{e['cpu']}, {threads(data)} of {e['cores']} cores; malloc {e['malloc']}."
    )
    if "arch" in data:
        console.print(f"Instructions: {data['arch']} of the native library, {data['torch_cpu']} of torch.")
    stock = "" if benchmark in FLAT else "stock = DynamicCache + sdpa of Transformers. "
    if any(STATIC in result["columns"] for result in data["results"]):
        stock += f"{STATIC} = StaticCache of just the capacity needed + sdpa, not compiled. "
    console.print(f"{stock}{NOTES[benchmark]}")
    show_busy(console, e)
    for line in dict.fromkeys(_asides(data["results"])):
        console.print(line, markup=False, highlight=False)
    what = "a selection" if benchmark == "crossover_decode" else "sparse prefill"
    for word, verdict in data.get("crossover", {}).items():
        _show_crossover(console, word, verdict, what)


def show_busy(console: Console, environment: Mapping[str, Any]) -> None:
    """Say where other processes took so much of the processors that the figures are no good."""
    others = environment["others"] or 0
    if others > QUIET:
        console.print(
            f"Other processes took {others:.0%} of the processors meanwhile: do not quote these.", style="red"
        )


def _print_tables(
    console: Console, title: str | None, header: list[str], lines: list[list[str]], by_case: bool
) -> None:
    """The lines, of which the first two columns are ``case_name``; ``by_case`` makes a heading of those two."""
    rows = []
    case = None
    skipped = 2 if by_case else 0
    for line in lines:
        if by_case and line[:2] != case:
            rows += [None] * bool(rows)
            case = line[:2]
            rows += [[f"[bold]{part}[/]"] for part in case if part]
        rows.append(line[skipped:])
    for table in tables(title, header[skipped:], rows, console.width, left=TEXTS, key=1 if by_case else 2):
        console.print(table)


def _asides(results: list[dict]) -> Iterator[str]:
    """What the tables have no place for: columns that did not run, and what a press kept."""
    for result in results:
        if "prompts" in result:
            yield f"Prompts: {result['prompts']}."
        if result.get("config") is not None:
            yield "{} = {name}, {retrieval_heads} of {kv_heads} KV heads keep every token.".format(
                CONFIG, **result["config"]
            )
        for name, why in result.get("left_out", {}).items():
            yield f"Not measured: {name}: {why}"
        where = ", ".join(filter(None, [f"{result['dtype']} at {result['tokens']}", case_name(result)[1]]))
        for name, why in result.get("not_measured", {}).items():
            yield f"Not measured: {name}, {where}: {why}"
        for name, column in result["columns"].items():
            if "kept" in column:
                yield f"{name}, {where}: holds {column['kept']:.1%} of the prompt's K/V; answers not compared."


def _show_crossover(console: Console, word: str, verdict: dict, what: str) -> None:
    """From which length on ``what`` wins, and what to write; or that it never did."""
    tokens = verdict["min_tokens"]
    lengths = f"{verdict['shortest']} to {verdict['longest']}"
    if tokens is None:
        console.print(
            f"  {word}: {what} did not win at the longest of the lengths measured ({lengths} tokens). Leave these "
            "heads dense here, or measure longer ones (--tokens).",
            style="yellow",
        )
        return
    console.print(f"  {word}: {what} wins from {tokens} tokens on (measured: {lengths}).", style="green")
    plain = {"markup": False, "highlight": False, "soft_wrap": True}
    console.print(f"    in Python:  {verdict['python']}\n    in a YAML:", **plain)
    console.print(textwrap.indent(verdict["yaml"].rstrip(), " " * 8), **plain)


def subject(data: dict) -> str:
    """The checkpoint, where one is measured."""
    return f"{data['model']}: " if data["benchmark"] == "real" else ""


def _sizes(benchmark: str, s: dict) -> str:
    """What else the settings say of a model, and of its streaming heads."""
    if benchmark.startswith("crossover"):
        return ""
    if benchmark == "kernels":
        return kernels_table.sizes(s)
    keep = f"; streaming heads keep sink {s['sink']} + recent {s['recent']}"
    if benchmark == "real":
        return f"{keep} in {HALF}; {count(s['steps'], 'token')} decoded per timing"
    return (
        f", hidden {s['hidden']}, MLP {s['intermediate']}, vocabulary {s['vocabulary']} (small on purpose, lm_head "
        f"would dominate){keep}"
    )


def _ms(samples: dict) -> str:
    return "{} ({} - {})".format(*(digits(samples[name]) for name in ("median_ms", "low_ms", "high_ms")))


def _decode(results: list[dict]) -> list[list[str]]:
    static = any(STATIC in result["columns"] for result in results)
    lines = [
        ["dtype", "tokens", "", "kernel", "ms per layer", "vs stock", *["vs static"] * static, f"vs {RETRIEVAL}"]
        + ["KV MB/layer", "read at GB/s", "of sum"]
    ]
    selects = any("instead_of" in column for result in results for column in result["columns"].values())
    if selects:
        lines[0] += ["tokens read", "vs dense"]
    for result in results:
        columns = result["columns"]
        ms = {name: column["ms_per_layer"]["median_ms"] for name, column in columns.items()}
        for name, column in columns.items():
            bases = (STOCK, *[STATIC] * static, RETRIEVAL)
            times = [f"{ms[base] / ms[name]:.2f}x" if base in ms else "" for base in bases]
            whole = "gb_per_s" in column
            speed = [
                f"{column['kept_bytes_per_layer'] / 1e6:.1f}",
                f"{column['gb_per_s']:.2f}" if whole else "",
                f"{column['share_of_sum']:.0%}" if whole else "",
            ]
            more = _selected(column, ms, ms[name]) if selects else []
            lines.append(
                [*case_name(result), name, column["kernel"], _ms(column["ms_per_layer"]), *times, *speed, *more]
            )
    return lines


def _selected(column: dict, ms: dict[str, float], own: float) -> list[str]:
    """Of a selection: the share of the retrieval heads' tokens that was read, and the gain over reading all."""
    if "instead_of" not in column:
        return ["", ""]
    return [f"{column['read']:.1%}", f"{ms[column['instead_of']] / own:.2f}x"]


def _prefill(results: list[dict]) -> list[list[str]]:
    lines = [
        ["dtype", "tokens", "", "kernel", "attention ms", "vs stock", f"vs {RETRIEVAL}", "of 1/density"]
        + ["cache update ms"]
    ]
    for result in results:
        ms = {name: column["ms"]["median_ms"] for name, column in result["columns"].items()}
        for name, column in result["columns"].items():
            times = [f"{ms[STOCK] / ms[name]:.2f}x", f"{ms[RETRIEVAL] / ms[name]:.2f}x"]
            density = column.get("density")
            share = "" if density is None else f"{density * ms[STOCK] / ms[name]:.0%} ({density:.1%})"
            ran = [name, column["kernel"], _ms(column["ms"])]
            lines.append([*case_name(result), *ran, *times, share, _ms(column["update_ms"])])
    return lines


def _choosing(results: list[dict]) -> list[list[str]]:
    lines = [["dtype", "tokens", "choosing with", "ms", "of stock's attention", "density"]]
    for result in results:
        for name, pattern in result["patterns"].items():
            shares = [f"{pattern['share_of_stock']:.2%}", f"{pattern['density']:.1%}"]
            lines.append([*case_name(result), name, _ms(pattern["ms"]), *shares])
    return lines


def _whole(results: list[dict]) -> list[list[str]]:
    static = any(STATIC in result["columns"] for result in results)
    lines = [
        ["dtype", "tokens", "", "kernel", "density", "prompt ms", "prompt, of stock", "token ms", "token, of stock"]
        + [*["token, of static"] * static, "both, of stock", *["both, of static"] * static]
    ]
    for result in results:
        for name, column in result["columns"].items():
            parts = [_ms(column["prefill_ms"]), f"{column['prefill_ratio']:.1%}"]
            for part in ("decode", "total"):
                parts += [_ms(column["decode_ms"])] if part == "decode" else []
                parts += [f"{column[f'{part}_ratio']:.1%}"]
                of_static = column.get(f"{part}_of_static")
                parts += ["" if of_static is None else f"{of_static:.1%}"] * static
            density = column.get("density")
            ran = [name, column["kernel"], "" if density is None else f"{density:.1%}"]
            lines.append([*case_name(result), *ran, *parts])
    return lines


def _checkpoint(results: list[dict]) -> list[list[str]]:
    lines = [["dtype", "tokens", "", "kernel", "prompt ms", "prompt vs stock", "token ms", "token vs stock", "KV MB"]]
    for result in results:
        for name, column in result["columns"].items():
            ran = [name, column["kernel"]]
            for part in ("prefill", "decode"):
                ran += [digits(column[f"{part}_ms"]["median_ms"]), f"{1 / column[f'{part}_ratio']:.2f}x"]
            held = column.get("kv_bytes")
            lines.append([*case_name(result), *ran, "" if held is None else f"{held / 1e6:.1f}"])
    return lines


def _crossover(results: list[dict]) -> list[list[str]]:
    lines = [
        ["dtype", "tokens", "kernel", "dense ms", "sparse ms", "density", "times faster", "in the worst round", "wins"]
    ]
    for result in results:
        dense, sparse = result["columns"].values()
        kernels = "/".join(dict.fromkeys((dense["kernel"], sparse["kernel"])))
        figures = [kernels, _ms(dense["ms"]), _ms(sparse["ms"]), f"{sparse['density']:.1%}"]
        gains = [f"{result[name]:.2f}x" for name in ("faster", "faster_in_worst")]
        case = [result["dtype"], str(result["tokens"])]
        lines.append([*case, *figures, *gains, "yes" if result["wins"] else "no"])
    return lines


def case_name(result: dict) -> list[str]:
    """Two texts: the dtype and the tokens; what else differs between cases: sequences and threads, or functions."""
    more = f"batch {result['batch']}, {count(result['threads'], 'thread')}" if "batch" in result else ""
    if "function" in result:
        more = kernels_table.case_words(result)
    return [f"{result['dtype']}, {result['tokens']} tokens", more]


def threads(data: dict) -> str:
    """Of torch, in words: of the process, or those that the cases had."""
    every = data["settings"].get("threads")
    *first, last = every if isinstance(every, (list, tuple)) else [data["environment"]["threads"]]
    return f"{', '.join(map(str, first))} and {last} threads" if first else count(last, "thread")


TABLES = {
    "decode": [_decode],
    "prefill": [_prefill, _choosing],
    "e2e": [_whole],
    "real": [_checkpoint],
    "crossover": [_crossover],
    "crossover_decode": [_crossover],
    "kernels": [kernels_table.lines],
}
