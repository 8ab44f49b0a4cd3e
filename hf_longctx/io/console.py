"""Where the commands print their tables."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 140  # columns


def console() -> Console:
    """Standard output: as wide as the terminal, or, in a file or a pipe, wide enough for every table of ours.

    There rich would take 80 columns and break the words of a table. ``COLUMNS`` rules over both.
    """
    plain = Console()
    return plain if plain.is_terminal or "COLUMNS" in os.environ else Console(width=WIDE)


def tables(
    title: str | None,
    names: Sequence[str],
    rows: Sequence[Sequence[str] | None],
    width: int,
    *,
    left: Sequence[str] = ("",),
    key: int = 1,
) -> Iterator[Table]:
    """A table whose words stay whole: where it is wider than ``width``, headings are wrapped; where that is not enough,
    the columns are shared out among several tables, each of which begins with the first ``key`` ones.

    Args:
        rows: cells in the order of ``names``, with markup; the last ones may be missing. None: a line between.
        left: headings of the columns of words; figures are on the right.
    """
    cells = [
        max((_long(row[i]) for row in rows if row is not None and i < len(row)), default=0) for i in range(len(names))
    ]
    most = max(len(name.split()) for name in names)
    for lines in (*range(1, 1 + most), 2):  # of the headings, as few as will do; two where nothing does
        heads = [_wrapped(name, cell, lines) for name, cell in zip(names, cells, strict=True)]
        sizes = [max([cell, *map(len, head.split("\n"))]) for head, cell in zip(heads, cells, strict=True)]
        if _width(sizes) <= width:
            break
    parts = [list(range(key))]
    for column in range(key, len(names)):
        if len(parts[-1]) > key and _width([sizes[i] for i in (*parts[-1], column)]) > width:
            parts.append(list(range(key)))
        parts[-1].append(column)
    for number, part in enumerate(parts):
        table = Table(title=None if number else title)
        for i in part:
            table.add_column(heads[i], justify="left" if names[i] in left else "right", overflow="fold")
        for row in rows:
            if row is None:
                table.add_section()
            else:
                table.add_row(*(row[i] if i < len(row) else "" for i in part))
        yield table


def _wrapped(name: str, least: int, lines: int) -> str:
    """A heading in so many lines at most, as narrow as that allows and at least ``least`` wide; words stay whole."""
    sizes = range(max([1, least, *map(len, name.split())]), len(name) + 1)
    options = (textwrap.wrap(name, size) for size in sizes)
    return "\n".join(next((option for option in options if len(option) <= lines), [name]))


def _width(sizes: Sequence[int]) -> int:
    """Of a table with columns of these sizes: a line and two spaces for each, and the last line."""
    return sum(sizes) + 3 * len(sizes) + 1


def count(number: int, word: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{number} {word}{'s' if number != 1 else ''}"


def _long(cell: str) -> int:
    return Text.from_markup(cell).cell_len
