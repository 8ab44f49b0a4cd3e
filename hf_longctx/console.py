"""Where the commands print their tables, and what they do not show."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

WIDE = 140  # columns


def console() -> Console:
    """Standard output: as wide as the terminal, or, in a file or a pipe, wide enough for every table of ours.

    There rich would take 80 columns and break the words of a table. ``COLUMNS`` rules over both.
    """
    plain = Console()
    return plain if plain.is_terminal or "COLUMNS" in os.environ else Console(width=WIDE)


@contextmanager
def no_bars() -> Iterator[None]:
    """Without Transformers' progress bars: for models that load in no time, and where there is no terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
