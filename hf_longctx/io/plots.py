"""Pictures of head maps. Needs matplotlib, which the extra ``eval`` brings."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from ..config.config import LongCtxConfig


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, without any of matplotlib's global state.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "plot: matplotlib is not installed; the extra 'eval' brings it: pip install matplotlib."
        ) from None
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


# the last one stands out from all colours of the map
RETRIEVAL = "#d1350f"
STREAMING = "#7f8c9b"
OUTLINE = "#e6002e"


def head_map(config: LongCtxConfig) -> Figure:
    """The heads of a config as a picture, with the model's name as its title.

    A map has a row per layer and a column per KV head, coloured by the rank of its score, retrieval heads outlined.
    Beside it are all scores from the highest to the lowest, with the cut between the roles. A config of roles alone has
    the map alone.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    roles = config.roles()
    active = config.heads.active
    model = config.model
    layers = model.num_hidden_layers
    width = model.num_key_value_heads
    across = max(3.6, 1.6 + 0.17 * width)
    figure = new_figure(across + (4.2 if active.scores else 1.2), min(14.0, max(3.4, 1.6 + 0.16 * layers)))
    figure.suptitle(model.ids[0] if model.ids else model.model_type, fontsize=12, fontweight="bold")
    if not active.scores:
        axes = figure.add_subplot()
        _map(axes, [[float(role == "R") for role in row] for row in roles], roles)
        axes.set_title(f"outlined: retrieval heads ({config.retrieval_heads / config.kv_heads:.1%})", fontsize=9)
        return figure
    left, right = figure.subplots(1, 2, width_ratios=[across, 4.2])
    ranks = _ranks(active.scores)
    image = _map(left, ranks, roles)
    left.set_title("rank of the score; outlined: retrieval heads", fontsize=9)
    bar = figure.colorbar(image, ax=left, ticks=[0, 0.5, 1], pad=0.02)
    bar.ax.set_yticklabels(["lowest", "middle", "highest"], fontsize=8)
    _sorted(right, config.scores, [roles[layer] for layer in config.layers], active.source.get("method", "score"))
    return figure


def _map(axes: Axes, values: Sequence[Sequence[float]], roles: Sequence[str]) -> AxesImage:
    """A cell per head, 0 to 1, retrieval heads outlined."""
    from matplotlib.patches import Rectangle

    layers = len(roles)
    width = len(roles[0])
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    line = 1.4 if layers * width <= 512 else 1.1
    for layer, row in enumerate(roles):
        for head, role in enumerate(row):
            if role == "R":
                box = Rectangle((head - 0.44, layer - 0.44), 0.88, 0.88, fill=False, edgecolor=OUTLINE, linewidth=line)
                axes.add_patch(box)
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(0, width, max(1, width // 8)))
    axes.set_yticks(range(0, layers, max(1, layers // 16)))
    return image


def _sorted(axes: Axes, scores: Sequence[Sequence[float]], roles: Sequence[str], method: str) -> None:
    """All scores from the highest to the lowest, in the colour of their role, and the cut."""
    flat = sorted(zip((s for row in scores for s in row), "".join(roles), strict=True), key=lambda one: -one[0])
    count = sum(role == "R" for _, role in flat)
    for letter, colour, name in (("R", RETRIEVAL, "retrieval"), ("S", STREAMING, "streaming")):
        places = [(place, score) for place, (score, role) in enumerate(flat, 1) if role == letter]
        label = f"{name}: {len(places)} of {len(flat)} heads"
        axes.plot(*zip(*places, strict=True) if places else ([], []), ".", color=colour, markersize=4, label=label)
    axes.axvline(count + 0.5, color="black", linewidth=0.9, linestyle="--")
    positive = [score for score, _ in flat if score > 0]
    if positive and positive[0] > 50 * positive[len(positive) // 2]:
        small = max(positive[-1], positive[0] / 1e4)
        axes.set_yscale("symlog", linthresh=small)
        axes.set_ylim(min(flat[-1][0], -small / 2), 2 * positive[0])
    axes.set_title(f"{method}: {count / len(flat):.1%} retrieval heads", fontsize=9)
    axes.set_xlabel("KV heads, from the highest score")
    axes.set_ylabel("score")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(fontsize=8, loc="best")


def _ranks(scores: Sequence[Sequence[float]]) -> list[list[float]]:
    """The place of every score among all, 0 the lowest and 1 the highest; equal ones share the middle of theirs."""
    ordered = sorted(score for row in scores for score in row)
    last = max(1, len(ordered) - 1)
    return [
        [(bisect_left(ordered, score) + bisect_right(ordered, score) - 1) / 2 / last for score in row] for row in scores
    ]


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure; the ending of the path says in which format."""
    figure.savefig(path)
