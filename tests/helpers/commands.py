"""The commands of the command line, as they are found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from hf_longctx.commands._app import app


def every_command(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words, command) of every command, groups left out."""
    group = typer.main.get_command(app) if group is None else group
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from every_command(command, (*path, name))
        else:
            yield (*path, name), command
