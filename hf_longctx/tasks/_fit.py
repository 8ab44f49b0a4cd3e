"""As much of something as a number of tokens has room for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def largest(build: Callable[[int], T], cost: Callable[[T], int], least: int, room: int) -> T:
    """``build(n)`` for the largest n of at least ``least`` whose cost is within ``room``, or one close to it.

    The cost grows with n. ``build(least)`` is returned even where it costs more.
    """
    low = least
    made = build(least)
    high = 2 * least
    over = build(2 * least)
    while cost(over) <= room:
        low = high
        made = over
        high, over = 2 * high, build(2 * high)
    while room > cost(made):
        guess = low + int((high - low) * (room - cost(made)) / (cost(over) - cost(made)))
        if not low < guess < high:
            break
        tried = build(guess)
        if cost(tried) <= room:
            low = guess
            made = tried
        else:
            high = guess
            over = tried
    return made
