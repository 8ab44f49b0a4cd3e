"""``frequent_words``: the most frequent words of a text whose words follow a power law."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from .._words import coded
from ..base import Draft, Task
from ..language import Wording
from ._counting import counting

WORDING = Wording(
    intro="Below is a text in code. The dots mean nothing, the words are counted.\n\nText:",
    tell="{key}",
    ask="What are the {key} most frequent words of the text, the dots left out?",
    lead="The {key} most frequent words of the text are",
)
NOISE = "..."


@dataclass(frozen=True)
class FrequentWords(Task):
    """Frequent words extraction as in RULER (arXiv:2404.06654).

    The word of rank r makes up a share r**-alpha / zeta(alpha) of the text, rounded down, and what is left are words
    that appear once. Rank 1 is noise ("..."), which is not asked for. The words mean nothing.

    Attributes:
        alpha: of the zeta distribution; the smaller, the harder.
        words: how many are asked for, from rank 2 on.
    """

    paper = "arXiv:2404.06654"
    cases = ({}, {"words": 2, "alpha": 1.5})
    deep = False

    alpha: float = field(default=2.0, metadata={"min": 1.1, "max": 8.0})
    words: int = field(default=3, metadata={"min": 1, "max": 64, "unit": "words"})

    def draft(self, language, length, depth, rng) -> Draft:
        def build(n: int) -> tuple[list[str], list[str], list[int]]:
            counts = self.counts(n)
            drawn = [NOISE, *coded(rng(0), len(counts) - 1)]
            listed = [word for word, count in zip(drawn, counts, strict=True) for _ in range(count)]
            asked = slice(1, 1 + self.words)
            return [listed[i] for i in rng(1).permutation(len(listed))], drawn[asked], counts[asked]

        return counting(self, language, WORDING, build, self.least, length, rng)

    @property
    def least(self) -> int:
        """Words of the shortest text in which the last word asked for is surely more frequent than all after it: than
        the next rank, and than the words that appear once.
        """
        last = (1 + self.words) ** -self.alpha
        return math.ceil(zeta(self.alpha) * max(1 / (last - (2 + self.words) ** -self.alpha), 2 / last))

    def counts(self, n: int) -> list[int]:
        """How often the word of each rank appears in a text of ``n`` words."""
        ranks = np.arange(1, n + 1, dtype=np.float64)
        counts = (n * ranks**-self.alpha / zeta(self.alpha)).astype(np.int64)
        counts = counts[counts > 0].tolist()
        return [*counts, *[1] * (n - sum(counts))]


def zeta(alpha: float) -> float:
    """Riemann's zeta function for alpha > 1: the first 10,000 terms, and the rest as an integral."""
    n = 10_000
    return float((np.arange(1, n + 1, dtype=np.float64) ** -alpha).sum() + (n + 0.5) ** (1 - alpha) / (alpha - 1))
