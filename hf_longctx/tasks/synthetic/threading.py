"""``threading``: values that are keys again, followed to the end of the thread."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ..base import Draft, Question, Task
from ..language import Wording
from ._pairs import Pairs, listing
from .key_value import WORDING

START = replace(
    WORDING,
    ask='Begin at the key "{key}". As long as its value is a key of the JSON object, go on to that key. What is the '
    "value at the end?",
    lead='The value at the end is "',
)
STARTS = replace(
    START,
    ask="Begin at each of the keys {key}. As long as its value is a key of the JSON object, go on to that key. What "
    "are the values at the ends?",
    lead="The values at the ends are",
)


@dataclass(frozen=True)
class Threading(Task):
    """Forward threads over the keys of a JSON object, one or several at once (arXiv:2411.05000).

    Each key of a thread stands after the one that leads to it. The ends of the threads are next to each other at
    ``depth``, the other pairs anywhere before them.

    Attributes:
        hops: pairs of a thread.
        threads: threads followed in one question.
    """

    paper = "arXiv:2411.05000"
    cases = ({}, {"threads": 2, "hops": 3})

    hops: int = field(default=4, metadata={"min": 1, "max": 256, "unit": "pairs"})
    threads: int = field(default=1, metadata={"min": 1, "max": 64, "unit": "threads"})

    def draft(self, language, length, depth, rng) -> Draft:
        wording: Wording = START if self.threads == 1 else STARTS

        def build(n: int) -> tuple[Pairs, list[Question], list[int]]:
            keys, values = language.draw(rng(0), n, wording)
            threads = self.places(n, depth, rng(1))
            for thread in threads:
                for here, following in zip(thread, thread[1:], strict=False):
                    values[here] = keys[following]
            prompt = language.ask(wording, [keys[thread[0]] for thread in threads])
            question = self.question(language, prompt, [values[thread[-1]] for thread in threads])
            return list(zip(keys, values, strict=True)), [question], [i for thread in threads for i in thread]

        return listing(self, language, wording, build, self.hops * self.threads, length, rng)

    def places(self, n: int, depth: float | None, rng: np.random.Generator) -> list[list[int]]:
        """Where the pairs of each thread stand among ``n`` pairs, ascending."""
        count = self.threads
        of_all = self.threads * self.hops
        if depth is None:
            drawn = rng.choice(n, of_all, replace=False).reshape(count, self.hops)
            return np.sort(drawn, axis=1).tolist()
        end = max(of_all, round(depth * n))
        before = rng.choice(end - count, of_all - count, replace=False).reshape(count, self.hops - 1)
        return np.column_stack([np.sort(before, axis=1), end - count + rng.permutation(count)]).tolist()
