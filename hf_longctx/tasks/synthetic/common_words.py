"""``common_words``: the words of a list that appear more often than the others."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import ConfigError
from .._words import coded
from ..base import Draft, Task
from ..language import Wording
from ._counting import counting

WORDING = Wording(
    intro="Below is a list of words. Some of them appear more often than the others.\n\nList:",
    tell="{key}",
    ask="What are the {key} most common words of the list?",
    lead="The {key} most common words of the list are",
)


@dataclass(frozen=True)
class CommonWords(Task):
    """Common words extraction as in RULER (arXiv:2404.06654): every common word appears ``count`` times, every other
    one ``others`` times; the number of other words makes the length. The words mean nothing.

    Attributes:
        words: common words, all asked for.
    """

    paper = "arXiv:2404.06654"
    cases = ({"words": 4, "count": 6, "others": 2},)
    deep = False

    words: int = field(default=10, metadata={"min": 1, "max": 1024, "unit": "words"})
    count: int = field(default=30, metadata={"min": 2, "max": 2**20, "unit": "times"})
    others: int = field(default=3, metadata={"min": 1, "max": 2**20, "unit": "times"})

    def __post_init__(self) -> None:
        if self.others >= self.count:
            raise ConfigError(f"others: got {self.others}, expected less than count, which is {self.count}.")

    def draft(self, language, length, depth, rng) -> Draft:
        def build(n: int) -> tuple[list[str], list[str], list[int]]:
            drawn = coded(rng(0), self.words + n)
            common = drawn[: self.words]
            others = drawn[self.words :]
            listed = common * self.count + others * self.others
            return [listed[i] for i in rng(1).permutation(len(listed))], common, [self.count] * self.words

        return counting(self, language, WORDING, build, 1, length, rng)
