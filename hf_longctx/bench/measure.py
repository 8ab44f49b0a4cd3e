"""Timing: columns take turns, so that a machine that slows down or speeds up does so for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median


@dataclass
class Samples:
    """The raw times of one column, in milliseconds, in the order they were measured."""

    ms: list[float] = field(default_factory=list)

    def time(self, work: Callable[[], object], divide: int = 1) -> object:
        """Run ``work``, note its time divided by ``divide``, and return its result."""
        start = time.perf_counter()
        result = work()
        self.ms.append(1000 * (time.perf_counter() - start) / divide)
        return result

    @property
    def median(self) -> float:
        return median(self.ms)

    @property
    def spread(self) -> tuple[float, float]:
        """10th and 90th percentile; the extremes of fewer than 10 samples."""
        ordered = sorted(self.ms)
        cut = len(ordered) // 10
        return ordered[cut], ordered[-1 - cut]

    def as_dict(self) -> dict:
        low, high = self.spread
        return {"median_ms": self.median, "low_ms": low, "high_ms": high, "raw_ms": self.ms}


Told = Callable[[int], object]  # called after every round with the tokens of its case


def quiet(tokens: int) -> None:
    """Tells nobody."""


def turns(columns: Mapping[str, object], rounds: int, tokens: int, told: Told) -> Iterator[tuple[int, str]]:
    """(round, column name): every column once per round, another one first each time; then ``told(tokens)``."""
    names = list(columns)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            yield number, name
        told(tokens)


def digits(number: float) -> str:
    """In three digits, or as a whole number."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def paired_ratio(samples: Samples, base: Samples) -> float:
    """Median of the ratios of samples taken in the same round, which cancels what slows down a whole round."""
    return median(mine / other for mine, other in zip(samples.ms, base.ms, strict=True))
