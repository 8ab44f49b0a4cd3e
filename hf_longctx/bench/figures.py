"""The pictures of the benchmarks, each drawn from what the JSON holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..io.console import count
from ..io.plots import new_figure
from .columns import STATIC
from .crossover import DENSE, SPARSE
from .kernels_table import joined
from .measure import digits
from .show import QUIET, case_name, subject, threads

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#8a8a8a"
BLUE = "#3b76af"
ORANGE = "#d95f02"
WHOLE = {"prefill_ms": "prompt to logits, ms", "decode_ms": "one decoded token, ms"}
PARTS = {  # benchmark -> the times of a column, and what they are called
    "decode": {"ms_per_layer": "one token, ms per layer"},
    "prefill": {"ms": "attention over the prompt, ms"},
    "kernels": {"ms": "attention, ms"},
    "e2e": WHOLE,
    "real": WHOLE,
}


@dataclass(frozen=True)
class Bar:
    """One bar: where it ends, from where to where the spread goes (if it has one), and what stands beside it."""

    name: str
    value: float
    spread: tuple[float, float] | None
    said: str
    colour: str


def draw(data: dict) -> Figure:
    """The picture of one benchmark's ``as_json``.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    makers = {"crossover": _crossover, "crossover_decode": _crossover, "memory": _memory}
    return makers.get(data["benchmark"], _times)(data)


def _times(data: dict) -> Figure:
    """A panel of bars per dtype, length and kind of time."""
    parts = PARTS[data["benchmark"]]
    results = data["results"]
    panels = [
        (", ".join(filter(None, case_name(result))), label, list(_bars(result, part)))
        for result in results
        for part, label in parts.items()
    ]
    wide = len(parts) if len(parts) > 1 else min(3, len({result["tokens"] for result in results}))
    high = -(-len(panels) // wide)
    most = max(len(bars) for _, _, bars in panels)
    figure = new_figure(max(6.5, 5.0 * wide), 1.3 + high * (1.0 + 0.26 * most))
    every = figure.subplots(high, wide, squeeze=False).ravel().tolist()
    for axes, (title, label, bars) in zip(every, panels, strict=False):
        _draw_bars(axes, bars)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(label, fontsize=8)
    for axes in every[len(panels) :]:
        axes.remove()
    base = next(iter(results[0]["columns"]))
    _head(figure, data, f"bars: medians, lines: 10th to 90th percentile; x: times faster than {base}")
    return figure


def _bars(result: dict, part: str) -> Iterator[Bar]:
    first, *_ = result["columns"]  # stock, or torch
    base = result["columns"][first][part]["median_ms"]
    for name, column in result["columns"].items():
        own = f"{part.removesuffix('_ms')}_ratio"  # the table's, of the same rounds, where it has one
        ratio = column.get(own, column[part]["median_ms"] / base)
        faster = "" if name == first else f"   {1 / ratio:.2f}x"
        yield _bar(name, column[part], faster, GREY if name in (first, STATIC) else BLUE)
    for name, pattern in result.get("patterns", {}).items():
        yield _bar(f"choosing: {name}", pattern["ms"], f"   {pattern['share_of_stock']:.1%} of stock", ORANGE)


def _bar(name: str, times: dict, said: str, colour: str) -> Bar:
    value = times["median_ms"]
    return Bar(name, value, (times["low_ms"], times["high_ms"]), digits(value) + said, colour)


def _draw_bars(axes: Axes, bars: list[Bar]) -> None:
    """Bars from top to bottom, each with its spread and its text."""
    for place, bar in enumerate(bars):
        axes.barh(place, bar.value, color=bar.colour, height=0.72)
        low, high = bar.spread or (bar.value, bar.value)
        if bar.spread:
            axes.plot([low, high], [place, place], color="black", linewidth=1.2, marker="|", markersize=5)
        at = (max(bar.value, high), place)
        axes.annotate(bar.said, at, xytext=(5, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], fontsize=8)
    axes.invert_yaxis()
    most = max(end for bar in bars for end in (bar.value, *(bar.spread or ())))
    axes.set_xlim(0, 1.6 * most or 1)  # room for the text
    _plain(axes, "x")


def _crossover(data: dict) -> Figure:
    """Time against length, dense and sparse, a panel per dtype; a line where sparse begins to win."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    decoded = data["benchmark"] == "crossover_decode"
    of, what = ("cached tokens", "a decoded token") if decoded else ("tokens of the prompt", "attention")
    words = list(dict.fromkeys(result["dtype"] for result in data["results"]))
    figure = new_figure(max(6.0, 4.6 * len(words)), 4.4)
    for axes, word in zip(figure.subplots(1, len(words), squeeze=False)[0], words, strict=True):
        results = [result for result in data["results"] if result["dtype"] == word]
        lengths = [result["tokens"] for result in results]
        for name, colour, marker in ((DENSE, GREY, "s"), (SPARSE, BLUE, "o")):
            times = [result["columns"][name]["ms"] for result in results]
            axes.plot(lengths, [t["median_ms"] for t in times], color=colour, marker=marker, markersize=4, label=name)
            low, high = ([t[side] for t in times] for side in ("low_ms", "high_ms"))
            axes.fill_between(lengths, low, high, color=colour, alpha=0.25, linewidth=0)
        first = data["crossover"][word]["min_tokens"]
        if first is not None:
            axes.axvline(first, color=ORANGE, linestyle="--", linewidth=1.2, label=f"sparse wins from {first} on")
        verdict = "" if first is not None else ": sparse did not win at the longest"
        axes.set_title(f"{word}{verdict}", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [str(length) for length in lengths], rotation=45)
        axes.set_xlabel(of, fontsize=8)
        axes.set_ylabel(f"{what} of a layer's retrieval heads, ms", fontsize=8)
        axes.legend(fontsize=8, loc="upper left")
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        _plain(axes, "both")
    _head(
        figure,
        data,
        f"medians, shaded: 10th to 90th percentile; choosing the {'tokens' if decoded else 'blocks'} is part of sparse",
    )
    return figure


def _memory(data: dict) -> Figure:
    """The longest context by way of keeping K/V."""
    results = data["results"]
    settings = data["settings"]
    bars = []
    dense = results[0]["longest"]
    for number, result in enumerate(results):
        tokens = result["longest"]
        said = "no limit" if tokens is None else f"{tokens}" if tokens else "none: the weights do not fit"
        faster = f"   {tokens / dense:.2f}x" if number and tokens and dense else ""
        bars.append(Bar(result["way"], tokens or 0, None, said + faster, BLUE if number else GREY))
    figure = new_figure(7.0, 2.4)
    axes = figure.add_subplot()
    _draw_bars(axes, bars)
    axes.set_xlabel("tokens of prompt and answer that fit, calculated", fontsize=8)
    figure.suptitle(
        f"longest context of {data['model']} in {settings['memory'] / 1e9:.4g} GB, {settings['dtype']}, "
        f"{count(settings['batch'], 'sequence')}, "
        + (f"read in chunks of {settings['chunk']}" if settings["chunk"] else "read in one forward"),
        fontsize=10,
    )
    return figure


def _plain(axes: Axes, axis: str) -> None:
    axes.grid(axis=axis, alpha=0.3)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _head(figure: Figure, data: dict, note: str) -> None:
    """Sizes and versions over the picture, so that it can be read without its table."""
    e = data["environment"]
    s = data["settings"]
    if data["benchmark"] == "prefill":  # of which one layer's streaming heads are measured
        s = {**s, "layers": 1, **{name: data["results"][0][name] for name in ("heads", "kv_heads")}}
    lines = [
        f"bench {data['benchmark']}: {subject(data)}{count(s['layers'], 'layer')}, {s['heads']} query and "
        f"{s['kv_heads']} KV heads, head_dim {joined(s['head_dim'])}",
        f"{e['cpu']}, {threads(data)} of {e['cores']} cores; torch {e['torch']}, transformers {e['transformers']}",
    ]
    if (e["others"] or 0) > QUIET:
        lines.append(f"other processes took {e['others']:.0%} of the processors: do not quote")
    figure.suptitle("\n".join(lines), fontsize=9)
    figure.supxlabel(f"{note}; {count(s['rounds'], 'round')}", fontsize=8)
