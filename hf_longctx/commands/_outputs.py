"""Where a benchmark's JSON and picture go: refused before anything is measured, written after it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SAVED, DRAWN = (
    "Write versions, settings and every figure here.",
    "Draw the table as a picture here (needs matplotlib).",
)
Json = Annotated[Path | None, typer.Option("--json", help=SAVED, dir_okay=False)]
Png = Annotated[Path | None, typer.Option("--png", help=DRAWN, dir_okay=False)]


def check(json: Path | None, png: Path | None = None) -> None:
    """Refuse what could not be written.

    Raises:
        typer.BadParameter: a folder is not there, or the picture's name ends in something else.
        ConfigError: a picture without matplotlib.
    """
    for option, path in (("--json", json), ("--png", png)):
        if path is not None and not path.parent.is_dir():
            raise typer.BadParameter(f"{path.parent} is not a folder", param_hint=option)
    if png is None:
        return
    if png.suffix.lower() != ".png":
        raise typer.BadParameter(f"{png.name!r} does not end in .png", param_hint="--png")
    from ..io.plots import new_figure

    new_figure(1, 1)


def write(json: Path | None, png: Path | None, data: dict) -> None:
    """Write one benchmark's ``as_json`` and its picture, of those that were asked for."""
    if json is not None:
        from ..bench.show import save

        save(json, data)
    if png is not None:
        from ..bench.figures import draw
        from ..io.plots import save as save_figure

        save_figure(draw(data), png)
