"""The tables of the benchmarks, and the JSON that holds everything."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from rich.console import Console

from ..io.console import count, tables
from .columns import RETRIEVAL, STATIC, STOCK
from .environment import environment
from .settings import Settings

TITLES = {
    "decode": "attention + cache update of one token, per layer",
    "prefill": "attention of some heads of one layer over the prompt: dense, streaming, by block lists",
    "e2e": "whole model: prompt to logits and one decoded token",
    "crossover": "attention of a layer's retrieval heads over a prompt: dense, and by their patterns",
}
TEXTS = ("dtype", "", "choosing with", "kernel", "wins")  # columns of words
QUIET = 0.05  # share of the processors that others may take before the figures are called bad
NOTES = {
    "decode": "Read at: kept K/V bytes over time, and as a share of the speed of torch.sum over the same buffers.",
    "prefill": "Only the KV heads that half streaming makes streaming (half of them, one layer), in every "
    "column. The cache update is not part of the attention time. blocks N% = random block lists, head by head, of "
    "N% of the causal blocks, which nobody had to choose. Of 1/density = vs stock, times the density in parentheses. "
    "Choosing: for the same heads, on random queries and keys that score near ones higher; density = what was listed.",
    "e2e": "Ratios are medians over rounds of patched / stock in the same round. The prompt gives the logits of its "
    "last token only. density = causal blocks that the retrieval heads read; choosing them is part of the time.",
    "crossover": "Both are the patched model, so that the gain is the patterns' alone; choosing the blocks is part of "
    "the sparse time. Queries and keys are random and score near ones higher: on a text, a pattern that looks at them "
    "may read more or less than this density. Wins = faster in every round (of 10 or more: in nine tenths).",
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
            _print_tables(console, title, header, lines, by_case=benchmark != "crossover")
    rest = (
        f", hidden {s['hidden']}, MLP {s['intermediate']}, vocabulary {s['vocabulary']} (small on purpose, lm_head "
        f"would dominate); streaming heads keep sink {s['sink']} + recent {s['recent']}"
    )
    console.print(
        f"{count(s['layers'], 'layer')}, {s['heads']} query heads, {s['kv_heads']} KV heads, head_dim {s['head_dim']}"
        f"{'' if benchmark == 'crossover' else rest}; kernel: {s['kernel']}; {s['rounds']} rounds, columns in turns; "
        "median (10th to 90th percentile)."
    )
    console.print(
        f"torch {e['torch']}, transformers {e['transformers']}, Python {e['python']}, hf_longctx {e['hf_longctx']}; "
        f"{e['cpu']}, {count(e['threads'], 'thread')} of {e['cores']} cores; malloc {e['malloc']}."
    )
    stock = "" if benchmark == "crossover" else "stock = DynamicCache + sdpa of Transformers. "
    if any(STATIC in result["columns"] for result in data["results"]):
        stock += f"{STATIC} = StaticCache of just the capacity needed + sdpa, not compiled. "
    console.print(f"{stock}{NOTES[benchmark]}")
    if (e["others"] or 0) > QUIET:
        console.print(
            f"Other processes took {e['others']:.0%} of the processors meanwhile: do not quote these.", style="red"
        )
    for line in dict.fromkeys(_asides(data["results"])):
        console.print(line, markup=False, highlight=False)
    for word, verdict in data.get("crossover", {}).items():
        _show_crossover(console, word, verdict)


def _print_tables(
    console: Console, title: str | None, header: list[str], lines: list[list[str]], by_case: bool
) -> None:
    """The lines, of which the first two columns are dtype and tokens; ``by_case`` makes a heading of those two."""
    rows = []
    case = None
    skipped = 2 if by_case else 0
    for line in lines:
        if by_case and line[:2] != case:
            rows += [None] * bool(rows)
            case = line[:2]
            rows.append([f"[bold]{case[0]}, {case[1]} tokens[/]"])
        rows.append(line[skipped:])
    for table in tables(title, header[skipped:], rows, console.width, left=TEXTS, key=1 if by_case else 2):
        console.print(table)


def _asides(results: list[dict]) -> Iterator[str]:
    """What the tables have no place for: columns that did not run, and what a press kept."""
    for result in results:
        where = f"{result['dtype']} at {result['tokens']}"
        for name, why in result.get("not_measured", {}).items():
            yield f"Not measured: {name}, {where}: {why}"
        for name, column in result["columns"].items():
            if "kept" in column:
                yield f"{name}, {where}: holds {column['kept']:.1%} of the prompt's K/V; answers not compared."


def _show_crossover(console: Console, word: str, verdict: dict) -> None:
    """From which length on sparse prefill wins, and what to write; or that it never did."""
    tokens = verdict["min_tokens"]
    lengths = f"{verdict['shortest']} to {verdict['longest']}"
    if tokens is None:
        console.print(
            f"  {word}: sparse prefill did not win at the longest of the prompts measured ({lengths} tokens). Leave "
            "these heads dense here, or measure longer prompts (--tokens).",
            style="yellow",
        )
        return
    console.print(f"  {word}: sparse prefill wins from {tokens} tokens on (measured: {lengths}).", style="green")
    plain = {"markup": False, "highlight": False, "soft_wrap": True}
    console.print(f"    in Python:  {verdict['python']}\n    in a YAML:", **plain)
    console.print(textwrap.indent(verdict["yaml"].rstrip(), " " * 8), **plain)


def _ms(samples: dict) -> str:
    numbers = (samples[name] for name in ("median_ms", "low_ms", "high_ms"))
    return "{} ({} - {})".format(*(f"{n:.0f}" if n >= 100 else f"{n:.3g}" for n in numbers))


def _decode(results: list[dict]) -> list[list[str]]:
    static = any(STATIC in result["columns"] for result in results)
    lines = [
        ["dtype", "tokens", "", "kernel", "ms per layer", "vs stock", *["vs static"] * static, f"vs {RETRIEVAL}"]
        + ["KV MB/layer", "read at GB/s", "of sum"]
    ]
    for result in results:
        columns = result["columns"]
        ms = {name: column["ms_per_layer"]["median_ms"] for name, column in columns.items()}
        for name, column in columns.items():
            bases = (STOCK, *[STATIC] * static, RETRIEVAL)
            times = [f"{ms[base] / ms[name]:.2f}x" if base in ms else "" for base in bases]
            speed = [
                f"{column['kept_bytes_per_layer'] / 1e6:.1f}",
                f"{column['gb_per_s']:.2f}",
                f"{column['share_of_sum']:.0%}",
            ]
            lines.append([*_case(result), name, column["kernel"], _ms(column["ms_per_layer"]), *times, *speed])
    return lines


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
            lines.append([*_case(result), *ran, *times, share, _ms(column["update_ms"])])
    return lines


def _choosing(results: list[dict]) -> list[list[str]]:
    lines = [["dtype", "tokens", "choosing with", "ms", "of stock's attention", "density"]]
    for result in results:
        for name, pattern in result["patterns"].items():
            shares = [f"{pattern['share_of_stock']:.2%}", f"{pattern['density']:.1%}"]
            lines.append([*_case(result), name, _ms(pattern["ms"]), *shares])
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
            lines.append([*_case(result), *ran, *parts])
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
        lines.append([*_case(result), *figures, *gains, "yes" if result["wins"] else "no"])
    return lines


def _case(result: dict) -> list[str]:
    return [result["dtype"], str(result["tokens"])]


TABLES = {"decode": [_decode], "prefill": [_prefill, _choosing], "e2e": [_whole], "crossover": [_crossover]}
