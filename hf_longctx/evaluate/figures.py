"""The pictures of an evaluation's report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..io.plots import new_figure
from .plan import DENSE, PATCHED
from .summary import Cell, Row, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#222222", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d")
MARKERS = "osD^vPX*"
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}  # under words, over lines
WIDE = 4  # heat maps beside each other, at most
ABREAST = 3  # panels beside each other, at most
PLACES = tuple(  # of a point's name: side, and its distance in points; the nearest first
    (side, dx, sign * dy) for dy in (9, 18, 27, 36) for sign in (-1, 1) for side, dx in (("left", 5), ("right", -5))
)
FAR = 16  # from the shortest to the longest length, beyond which their axis is logarithmic


def figures(summary: Summary) -> Iterator[tuple[str, str, Figure]]:
    """(file name without its ending, caption, picture) of every picture there is something for."""
    for task in summary.tasks:
        rows = [row for row in summary.by_depth if row.task == task and row.depth is not None]
        if rows:
            caption = f"{task}: accuracy by length of the prompt and depth of the facts asked for"
            yield f"depth-{slug(task)}", caption, heat_maps(task, rows, summary.variants)
    sweep = " Values of the sweep stand beside their points." if summary.swept else ""
    caption = (
        "Accuracy over all tasks against the KV bytes held, as a share of dense. The axis of the accuracy is fitted "
        f"to it. Bars: 95% interval of the difference to dense, on the same prompts.{sweep}"
    )
    yield "accuracy-kv", caption, tradeoff(summary)
    caption = "KV cache once the context is read (mean), time to the first token and per further token (medians)"
    yield "costs", caption, costs(summary)
    if summary.perplexity_by_position:
        caption = (
            "The perplexity text by position: negative log-likelihood in nats per token, the logarithm of the "
            "perplexity. The axis is fitted to it."
        )
        yield "perplexity-position", caption, by_position(summary)


def slug(task: str) -> str:
    """A task's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-")


def heat_maps(task: str, rows: list[Row], variants: tuple[str, ...]) -> Figure:
    """Accuracy by length and depth, one map per variant beside each other."""
    lengths = sorted({row.length for row in rows})
    depths = sorted({row.depth for row in rows})
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
    """Accuracy against the share of dense KV bytes: per length a curve through all variants, each with its name.

    The curves have panels of their own, with the same axes, so that every point has room for its name. The bars are the
    intervals of the difference to dense, which has none, around the accuracy of dense.
    """
    rows = summary.by_length
    high = -(-len(rows) // ABREAST)
    wide = -(-len(rows) // high)
    figure = new_figure(max(5.6, 1 + 3.6 * wide), 0.6 + 3 * high)
    every = figure.subplots(high, wide, squeeze=False, sharex=True, sharey=True).ravel().tolist()
    points = [_points(summary, row) for row in rows]
    for number, (axes, row, own) in enumerate(zip(every, rows, points, strict=False)):
        axes.set_title(f"{_tokens(row.length)} tokens", fontsize=9)
        style = {"color": _colour(number + 1), "marker": MARKERS[number % len(MARKERS)], "markersize": 5, "capsize": 3}
        x = [point.share for point in own]
        y = [point.accuracy for point in own]
        bars = [[point.accuracy - point.low for point in own], [point.high - point.accuracy for point in own]]
        axes.errorbar(x, y, yerr=bars, linewidth=1.5, elinewidth=1, **style)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8, labelbottom=True)
    for axes in every[len(rows) :]:
        axes.remove()
    every[0].set_xlim(0, 1.16 * max(point.share for own in points for point in own))
    every[0].set_ylim(*_fitted([value for own in points for point in own for value in (point.low, point.high)]))
    figure.supxlabel("KV cache, % of dense", fontsize=9)
    figure.supylabel("accuracy", fontsize=9)
    figure.draw_without_rendering()  # now the labels' sizes are known
    for axes, own in zip(every, points, strict=False):
        _label(axes, own)
    return figure


@dataclass(frozen=True)
class Point:
    """A variant at one length: KV bytes in % of dense, accuracy, and its interval."""

    said: str
    share: float
    accuracy: float
    low: float
    high: float


def _points(summary: Summary, row: Row) -> list[Point]:
    dense = row.cells[DENSE].accuracy
    found = []
    for name, cell in row.cells.items():
        lost = cell.difference
        ends = (cell.accuracy, cell.accuracy)
        if lost is not None and lost.low is not None and lost.high is not None:
            ends = (min(cell.accuracy, dense + lost.low), max(cell.accuracy, dense + lost.high))
        found.append(Point(_said(summary, name), 100 * cell.cache_share, cell.accuracy, *ends))
    return sorted(found, key=lambda point: point.share)


def _fitted(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis for these accuracies: at least a tenth apart, with room for names, but little above 1."""
    low = min(values)
    high = max(values)
    span = max(0.1, high - low)
    return low - 0.3 * span, min(high + 0.3 * span, 1 + 0.1 * span)


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Each point's name beside it, where it covers no other name and no point."""
    from matplotlib.transforms import Bbox

    taken = [axes.transData.transform((point.share, point.accuracy)) for point in points]
    boxes = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in taken]
    for point in points:
        at = (point.share, point.accuracy)
        said = {"textcoords": "offset points", "va": "center", "fontsize": 7, "bbox": PAPER, "in_layout": False}
        label = axes.annotate(point.said, at, xytext=(0, 0), **said)
        for side, dx, dy in PLACES:
            label.set(position=(dx, dy), ha=side)
            box = label.get_window_extent()
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            if inside and not box.padded(3).count_overlaps(boxes):
                break
        boxes.append(box)


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
    _legend(figure, summary)
    return figure


def by_position(summary: Summary) -> Figure:
    """NLL per token against the position, a line per variant."""
    spans = summary.perplexity_by_position
    figure = new_figure(max(5.6, 1.2 + 0.6 * len(spans)), 3.4)
    axes = figure.subplots()
    for number, name in enumerate(summary.variants):
        values = [span.cells[name].nll / span.cells[name].tokens for span in spans]
        axes.plot(range(len(spans)), values, **_style(number, name))
    axes.set_xticks(range(len(spans)), [span.name for span in spans], rotation=45)
    axes.set_xlabel("position: tokens read before the one predicted", fontsize=9)
    axes.set_ylabel("NLL, nats per token", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    _legend(figure, summary)
    return figure


def _legend(figure: Figure, summary: Summary) -> None:
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=min(4, len(summary.variants)), fontsize=8)


def _style(number: int, name: str) -> dict[str, Any]:
    """A variant's line."""
    kind = {"marker": MARKERS[number % len(MARKERS)], "markersize": 4, "linestyle": "--" if name == DENSE else "-"}
    return {"label": name, "color": _colour(number), **kind}


def _lines(axes: Axes, summary: Summary, value: Callable[[Cell], Any]) -> None:
    lengths = [row.length for row in summary.by_length]
    for number, name in enumerate(summary.variants):
        values = [value(row.cells[name]) for row in summary.by_length]
        points = [(x, y) for x, y in zip(lengths, values, strict=True) if y is not None]
        axes.plot(*zip(*points, strict=True), **_style(number, name))
    if lengths[-1] >= FAR * lengths[0]:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    axes.set_xticks(lengths, [_tokens(length) for length in lengths], rotation=45)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length >= 10_000 and length % 1024 == 0 else str(length)
