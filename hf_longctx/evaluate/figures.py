"""The pictures of an evaluation's report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..plots import new_figure
from .plan import DENSE, PATCHED
from .summary import Cell, Row, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#222222", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d")
MARKERS = "osD^vPX*"
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}  # under words, over lines
WIDE = 4  # heat maps beside each other, at most
FAR = 16  # from the shortest to the longest length, beyond which their axis is logarithmic


def figures(summary: Summary) -> Iterator[tuple[str, str, Figure]]:
    """(file name without its ending, caption, picture) of every picture there is something for."""
    for task in summary.tasks:
        rows = [row for row in summary.by_depth if row.task == task and row.depth is not None]
        if rows:
            caption = f"{task}: accuracy by length of the prompt and depth of the facts asked for"
            yield f"depth-{slug(task)}", caption, heat_maps(task, rows, summary.variants)
    sweep = " Values of the sweep are written beside their points." if summary.swept else ""
    caption = f"Accuracy over all tasks against the KV bytes held, as a share of dense.{sweep}"
    yield "accuracy-kv", caption, tradeoff(summary)
    caption = "KV cache once the context is read (mean), time to the first token and per further token (medians)"
    yield "costs", caption, costs(summary)


def slug(task: str) -> str:
    """A task's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-")


def heat_maps(task: str, rows: list[Row], variants: tuple[str, ...]) -> Figure:
    """Accuracy by length and depth, one map per variant beside each other."""
    lengths, depths = sorted({row.length for row in rows}), sorted({row.depth for row in rows})
    cells = {(row.length, row.depth): row.cells for row in rows}
    high = -(-len(variants) // WIDE)
    wide = -(-len(variants) // high)
    figure = new_figure(1.6 + wide * max(2.4, 0.62 * len(lengths)), 0.8 + high * max(2.2, 1.2 + 0.34 * len(depths)))
    every = figure.subplots(high, wide, squeeze=False).ravel().tolist()
    for axes, name in zip(every, variants, strict=False):
        values = [[cells[length, depth][name].accuracy for length in lengths] for depth in depths]
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths], fontsize=8, rotation=45)
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=8)
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                colour = "white" if value < 0.6 else "black"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    for axes in every[len(variants) :]:
        axes.remove()
    figure.supxlabel("tokens of the prompt", fontsize=9)
    figure.supylabel("depth (0: beginning)", fontsize=9)
    figure.suptitle(task, fontsize=10)
    figure.colorbar(image, ax=figure.axes, label="accuracy", shrink=0.9)
    return figure


def tradeoff(summary: Summary) -> Figure:
    """Accuracy against the share of dense KV bytes, a line per length through all variants."""
    figure = new_figure(6.4, 4.2)
    axes = figure.add_subplot()
    for number, row in enumerate(summary.by_length):
        points = sorted((cell.cache_share, cell.accuracy, name) for name, cell in row.cells.items())
        x, y, names = zip(*points, strict=True)
        style = {"color": _colour(number + 1), "marker": MARKERS[number % len(MARKERS)]}
        axes.plot([100 * share for share in x], y, label=f"{_tokens(row.length)} tokens", **style, markersize=5)
        if number == len(summary.by_length) - 1:
            for share, accuracy, name in points:
                side = "left" if share < 0.9 * x[-1] else "right"  # where the curve, which rises, leaves room
                said = {"textcoords": "offset points", "xytext": (5, -11), "ha": side, "fontsize": 7, "bbox": PAPER}
                axes.annotate(_said(summary, name), (100 * share, accuracy), **said)
    axes.set_xlabel("KV cache, % of dense")
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.03, 1.05)
    axes.set_xlim(0, 106 * max(cell.cache_share for row in summary.by_length for cell in row.cells.values()))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _said(summary: Summary, name: str) -> str:
    swept = summary.swept.get(name)
    if swept is None:
        return name
    return f"{name} ({swept})" if name == PATCHED else str(swept)


def costs(summary: Summary) -> Figure:
    """KV MB, prefill seconds and decode milliseconds against length, a line per variant."""
    figure = new_figure(9.6, 3.2)
    parts: list[tuple[str, Callable[[Cell], Any]]] = [
        ("KV cache, MB", lambda cell: cell.cache_bytes / 1e6),
        ("prefill, s", lambda cell: cell.prefill_s),
        ("decode, ms per token", lambda cell: cell.decode_ms),
    ]
    for axes, (label, value) in zip(figure.subplots(1, 3), parts, strict=True):
        _lines(axes, summary, value)
        axes.set_ylabel(label, fontsize=9)
        axes.set_xlabel("tokens of the prompt", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=min(4, len(summary.variants)),
        fontsize=8,
    )
    return figure


def _lines(axes: Axes, summary: Summary, value: Callable[[Cell], Any]) -> None:
    lengths = [row.length for row in summary.by_length]
    for number, name in enumerate(summary.variants):
        values = [value(row.cells[name]) for row in summary.by_length]
        points = [(x, y) for x, y in zip(lengths, values, strict=True) if y is not None]
        style = {"color": _colour(number), "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
        axes.plot(*zip(*points, strict=True), label=name, linestyle="--" if name == DENSE else "-", **style)
    if lengths[-1] >= FAR * lengths[0]:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    axes.set_xticks(lengths, [_tokens(length) for length in lengths], rotation=45)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length >= 10_000 and length % 1024 == 0 else str(length)
