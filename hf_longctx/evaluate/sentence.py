"""What an evaluation found, in a sentence per variant: as well as dense, worse, better, or too few prompts to tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .measures import Interval
from .plan import DENSE

if TYPE_CHECKING:
    from .summary import Row, Summary


def sentences(summary: Summary) -> list[str]:
    """One sentence per patched variant, the config as it was given first.

    The verdict is over all prompts, the KV memory that at the longest length. A variant that is not worse over all
    prompts but is worse at one length or in one task has a second sentence that says where.
    """
    return [_sentence(summary, name) for name in summary.variants if name != DENSE]


def _sentence(summary: Summary, name: str) -> str:
    lost = summary.overall.cells[name].difference
    longest = max(summary.by_length, key=lambda row: row.length)
    at = f"up to {longest.length}" if summary.bounded else longest.length
    memory = f"{_percent(longest.cells[name].cache_share)} % of the KV memory at {at} tokens."
    named = name if "=" in name else name.capitalize()
    figures = _figures(lost)
    if lost.verdict is None:
        first = f"Not enough prompts to tell whether {name} answers as well as dense {figures}; it holds {memory}"
    elif lost.verdict == "as well as":
        first = f"{named} answers as well as dense {figures} with {memory}"
    else:
        first = f"{named} answers {lost.verdict} than dense {figures} with {memory}"
    losses = [] if lost.verdict == "worse" else _losses(summary, name)
    return f"{first} But it is worse on {'; '.join(losses)}." if losses else first


def _losses(summary: Summary, name: str) -> list[str]:
    """Where a variant is significantly worse: by length, and by task and length; with one task these are the same."""
    rows: list[Row] = [*(summary.by_length if len(summary.tasks) > 1 else ()), *summary.by_task]
    return [
        f"{row.task or 'all tasks'} at {row.length} tokens {_figures(lost)}"
        for row in rows
        if (lost := row.cells[name].difference) is not None and lost.verdict == "worse"
    ]


def _figures(lost: Interval) -> str:
    """``(+0.000 [-0.010, +0.010], 36 prompts)``; of a single prompt there is no interval."""
    between = "" if lost.low is None else f" [{lost.low:+.3f}, {lost.high:+.3f}]"
    return f"({lost.difference:+.3f}{between}, {lost.pairs} prompt{'' if lost.pairs == 1 else 's'})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if share >= 0.1 else f"{100 * share:.2g}"
