"""The perplexity of a text by position: of the tokens that have so many tokens before them, in spans that double."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .measures import Perplexity
from .records import Record

FIELD = "by_position"  # of a record
FIRST = 256  # tokens: where the first span ends; every other ends at twice where it begins


@dataclass(frozen=True)
class Span:
    """Every variant at the positions from ``begin`` up to ``end``, which is left out.

    A token's position is how many tokens before it the model has read.
    """

    begin: int
    end: int
    cells: Mapping[str, Perplexity]

    @property
    def name(self) -> str:
        """``0-256``, ``1k-2k``."""
        return f"{_short(self.begin)}-{_short(self.end)}"

    @property
    def tokens(self) -> int:
        """Tokens predicted here; all variants read the same text."""
        return next(iter(self.cells.values())).tokens


def by_position(losses: Tensor) -> list[dict[str, Any]]:
    """The losses summed per span, as a record has them.

    Args:
        losses: ``[n]``, of the tokens at the positions 1 to n.
    """
    found = []
    begin, end = 0, FIRST
    while begin <= len(losses):
        part = losses[max(0, begin - 1) : end - 1]
        found.append({"begin": begin, "end": end, "nll": part.double().sum().item(), "tokens": len(part)})
        begin, end = end, 2 * end
    return found


def spans_of(records: Mapping[str, Sequence[Record]]) -> tuple[Span, ...]:
    """All windows together, from the records of each variant; none where a record is of before there were spans."""
    if not all(FIELD in record for own in records.values() for record in own):
        return ()
    parts: dict[tuple[int, int], dict[str, list[Record]]] = {}
    for name, own in records.items():
        for part in (part for record in own for part in record[FIELD]):
            parts.setdefault((part["begin"], part["end"]), {}).setdefault(name, []).append(part)
    return tuple(
        Span(*where, {name: pooled(own) for name, own in cells.items()}) for where, cells in sorted(parts.items())
    )


def pooled(parts: Sequence[Record]) -> Perplexity:
    """That of several parts of a text together."""
    return Perplexity(sum(part["nll"] for part in parts), sum(part["tokens"] for part in parts))


def table_of(spans: Sequence[Span]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): the perplexity of every variant, a row per span."""
    rows = [[span.name, str(span.tokens), *(f"{cell.value:.4g}" for cell in span.cells.values())] for span in spans]
    return ["position", "tokens", *(spans[0].cells if spans else ())], rows


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else str(tokens)
