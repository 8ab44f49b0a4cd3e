"""The tables of the benchmarks, their goals, and the JSON that holds everything."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .columns import RETRIEVAL, STOCK
from .environment import environment
from .goals import goals
from .settings import Settings

TITLES = {
    "decode": "attention + cache update of one token, per layer",
    "prefill": "attention of some heads of one layer over the prompt: dense, streaming, by block lists",
    "e2e": "whole model: prompt to logits and one decoded token",
}
QUIET = 0.05  # share of the processors that others may take before the figures are called bad
NOTES = {
    "decode": "Read at: kept K/V bytes over time, and as a share of the speed of torch.sum over the same buffers.",
    "prefill": "Only the KV heads that half streaming makes streaming (half of them, one layer), in every "
    "column. The cache update is not part of the attention time. blocks N% = random block lists, head by head, of "
    "N% of the causal blocks; choosing them is not timed. Of 1/density = vs stock, times the density in parentheses.",
    "e2e": "Ratios are medians over rounds of patched / stock in the same round.",
}


def as_json(benchmark: str, settings: Settings, results: list[dict], others: float | None = None) -> dict:
    """Versions, settings, every figure and raw time, and the goals.

    ``others`` is the share of the processors that other processes took meanwhile.
    """
    return {
        "benchmark": benchmark,
        "environment": {**environment(), "others": others},
        "settings": settings.as_dict(),
        "results": results,
        "goals": [goal.as_dict() for goal in goals(benchmark, settings, results)],
    }


def show(console: Console, data: dict) -> None:
    """Print one benchmark's ``as_json``: a table, what it ran on, and each goal."""
    benchmark, e, s = data["benchmark"], data["environment"], data["settings"]
    table = Table(title=f"bench {benchmark}: {TITLES[benchmark]}")
    rows = {"decode": _decode, "prefill": _prefill, "e2e": _whole}[benchmark]
    header, *lines = rows(data["results"])
    for name in header:
        table.add_column(name, justify="left" if name in ("dtype", "") else "right")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    console.print(
        f"{s['layers']} layers, {s['heads']} query heads, {s['kv_heads']} KV heads, head_dim {s['head_dim']}, hidden "
        f"{s['hidden']}, MLP {s['intermediate']}, vocabulary {s['vocabulary']} (small on purpose, lm_head would "
        f"dominate); streaming heads keep sink {s['sink']} + recent {s['recent']}; {s['rounds']} rounds, columns in "
        "turns; median (10th to 90th percentile)."
    )
    console.print(
        f"torch {e['torch']}, transformers {e['transformers']}, Python {e['python']}, hf_longctx {e['hf_longctx']}; "
        f"{e['cpu']}, {e['threads']} threads of {e['cores']} cores; malloc {e['malloc']}."
    )
    console.print(f"stock = DynamicCache + sdpa of Transformers. {NOTES[benchmark]}")
    if (e["others"] or 0) > QUIET:
        console.print(
            f"Other processes took {e['others']:.0%} of the processors meanwhile: do not quote these.", style="red"
        )
    for goal in data["goals"]:
        console.print(f"  {goal['text']}: {goal['verdict']}", style="green" if goal["reached"] else "yellow")


def save(path: Path, data: dict) -> None:
    """Write everything as JSON."""
    path.write_text(json.dumps(data, indent=1) + "\n")


def _ms(samples: dict) -> str:
    numbers = (samples[name] for name in ("median_ms", "low_ms", "high_ms"))
    return "{} ({} - {})".format(*(f"{n:.0f}" if n >= 100 else f"{n:.3g}" for n in numbers))


def _decode(results: list[dict]) -> list[list[str]]:
    lines = [
        ["dtype", "tokens", "", "ms per layer", "vs stock", f"vs {RETRIEVAL}", "KV MB/layer", "read at GB/s", "of sum"]
    ]
    for result in results:
        columns = result["columns"]
        ms = {name: column["ms_per_layer"]["median_ms"] for name, column in columns.items()}
        for name, column in columns.items():
            times = [f"{ms[STOCK] / ms[name]:.2f}x", f"{ms[RETRIEVAL] / ms[name]:.2f}x"]
            speed = [
                f"{column['kept_bytes_per_layer'] / 1e6:.1f}",
                f"{column['gb_per_s']:.2f}",
                f"{column['share_of_sum']:.0%}",
            ]
            lines.append([*_case(result), name, _ms(column["ms_per_layer"]), *times, *speed])
    return lines


def _prefill(results: list[dict]) -> list[list[str]]:
    lines = [["dtype", "tokens", "", "attention ms", "vs stock", f"vs {RETRIEVAL}", "of 1/density", "cache update ms"]]
    for result in results:
        ms = {name: column["ms"]["median_ms"] for name, column in result["columns"].items()}
        for name, column in result["columns"].items():
            times = [f"{ms[STOCK] / ms[name]:.2f}x", f"{ms[RETRIEVAL] / ms[name]:.2f}x"]
            density = column.get("density")
            share = "" if density is None else f"{density * ms[STOCK] / ms[name]:.0%} ({density:.1%})"
            lines.append([*_case(result), name, _ms(column["ms"]), *times, share, _ms(column["update_ms"])])
    return lines


def _whole(results: list[dict]) -> list[list[str]]:
    lines = [["dtype", "tokens", "", "prompt ms", "of stock", "token ms", "of stock", "both, of stock"]]
    for result in results:
        for name, column in result["columns"].items():
            parts = [_ms(column["prefill_ms"]), f"{column['prefill_ratio']:.1%}"]
            parts += [_ms(column["decode_ms"]), f"{column['decode_ratio']:.1%}", f"{column['total_ratio']:.1%}"]
            lines.append([*_case(result), name, *parts])
    return lines


def _case(result: dict) -> list[str]:
    return [result["dtype"], str(result["tokens"])]
