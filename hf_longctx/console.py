"""Where the commands print their tables."""

from __future__ import annotations

import os

from rich.console import Console

WIDE = 140  # columns


def console() -> Console:
    """Standard output: as wide as the terminal, or, in a file or a pipe, wide enough for every table of ours.

    There rich would take 80 columns and break the words of a table. ``COLUMNS`` rules over both.
    """
    plain = Console()
    return plain if plain.is_terminal or "COLUMNS" in os.environ else Console(width=WIDE)
