"""The table of families x shapes x modes x stores: a small set of cases in which every two values meet."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

from helpers.tiny import FAMILIES

FACTORS = {
    "family": FAMILIES,
    "group": (1, 4, 7),  # query heads per KV head
    "roles": ("retrieval", "streaming", "mixed", "by layer"),
    "length": (1, 63, 64, 65, 257, "window + 1", "10 windows"),  # tokens of the longest row
    "batch": ("one", "three", "padded"),
    "mode": ("one shot", "chunks", "first chunk all pads", "odd chunks"),
    "window": ((4, 16), (0, 7), (16, 64), (1, 1)),  # sink, recent
    "kernel": ("auto", "reference"),
}


class Case(NamedTuple):
    family: str
    group: int
    roles: str
    length: int | str
    batch: str
    mode: str
    window: tuple[int, int]
    kernel: str

    @property
    def tokens(self) -> int:
        whole = sum(self.window)
        return {"window + 1": whole + 1, "10 windows": 10 * whole}.get(self.length, self.length)

    def __str__(self) -> str:
        return "-".join(str(value).replace(" ", "_") for value in self)


def pairs(case: Case) -> set[tuple]:
    """Every (factor, value, factor, value) the case covers."""
    return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


def every_pair() -> set[tuple]:
    values = list(FACTORS.values())
    return {
        (i, a, j, b) for i, j in itertools.combinations(range(len(values)), 2) for a in values[i] for b in values[j]
    }


def pairwise(seed: int = 0) -> list[Case]:
    """Cases that cover every pair, found greedily from a fixed seed."""
    rng = random.Random(seed)
    missing, cases = every_pair(), []
    while missing:
        i, a, j, b = rng.choice(sorted(missing, key=repr))
        tries = []
        for _ in range(40):
            values = [rng.choice(options) for options in FACTORS.values()]
            values[i], values[j] = a, b
            tries.append(Case(*values))
        best = max(tries, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        cases.append(best)
    return cases


def product() -> list[Case]:
    """Every family, shape and mode; the stores' windows and the kernels take turns."""
    *shapes, windows, kernels = FACTORS.values()
    turns = itertools.cycle(itertools.product(windows, kernels))
    return [Case(*values, *next(turns)) for values in itertools.product(*shapes)]
