"""Pictures of head maps. Needs matplotlib, which the extra ``eval`` brings."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .config import LongCtxConfig


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


def head_map(config: LongCtxConfig) -> Figure:
    """The scores of a config as a picture, one row per layer and one column per KV head, retrieval heads outlined.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    from matplotlib.patches import Rectangle

    roles, active, model = config.roles(), config.heads.active, config.model
    layers, width = model.num_hidden_layers, model.num_key_value_heads
    figure = new_figure(max(4.5, 2.4 + 0.22 * width), max(3.0, 1.4 + 0.19 * layers))
    axes = figure.add_subplot()
    values = active.scores or [[float(role == "R") for role in row] for row in roles]
    image = axes.imshow(values, cmap="viridis", aspect="auto", interpolation="nearest")
    for layer, row in enumerate(roles):
        for head, role in enumerate(row):
            if role == "R":
                axes.add_patch(
                    Rectangle((head - 0.46, layer - 0.44), 0.92, 0.88, fill=False, edgecolor="#ff5a36", linewidth=1.3)
                )
    share = sum(row.count("R") for row in roles) / (layers * width)
    name = model.ids[0] if model.ids else model.model_type
    axes.set_title(
        f"{name}\n{active.source.get('method', 'head map')}: {share:.1%} retrieval heads (outlined)", fontsize=10
    )
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(0, width, max(1, width // 8)))
    axes.set_yticks(range(0, layers, max(1, layers // 16)))
    figure.colorbar(image, ax=axes, label="score" if active.scores else "role")
    return figure


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure; the ending of the path says in which format."""
    figure.savefig(path)
