"""How an answer is scored: name -> function of (output, reference answers), a share in [0, 1]. Case is ignored."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence


def string_match(output: str, answers: Sequence[str]) -> float:
    """Share of the answers that stand somewhere in the output; RULER's string_match_all (arXiv:2404.06654)."""
    return sum(_fold(answer) in _fold(output) for answer in answers) / len(answers)


def string_match_any(output: str, answers: Sequence[str]) -> float:
    """1 if any of the answers stands somewhere in the output; RULER's string_match_part (arXiv:2404.06654)."""
    return float(any(_fold(answer) in _fold(output) for answer in answers))


def exact_match(output: str, answers: Sequence[str]) -> float:
    """1 if the output's first line is the answers and nothing else, in any order.

    Several answers are parted by commas or "and"; quotes, asterisks and a full stop around one do not count.
    """
    line = next(iter(output.strip().splitlines()), "")
    given = [_fold(one).strip(" \t\"'`“”‘’*.") for one in re.split(r",|\band\b", line)]
    return float(sorted(one for one in given if one) == sorted(map(_fold, answers)))


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    one.__name__: one for one in (string_match, string_match_any, exact_match)
}
