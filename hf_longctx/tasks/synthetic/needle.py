"""``needle``: numbers of named things in a haystack, in RULER's four variants."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ...errors import ConfigError
from .._words import numbers
from ..base import Draft, Task
from ..language import Wording
from ._scattered import scattered

VARIANTS = ("single", "multi_key", "multi_value", "multi_query")
ONE = Wording(
    intro="Codes are hidden in the text below. Remember them, you will be asked for them.\n\nText:",
    tell=" The code of the {key} is {value}.",
    ask="What is the code of the {key} in the text?",
    lead="The code of the {key} is",
    values=numbers,
)
QUERY = replace(ONE, ask="What are the codes of the {key} in the text?", lead="The codes of the {key} are")
VALUE = replace(QUERY, tell=" One of the codes of the {key} is {value}.", ask="What are all codes of the {key}?")


@dataclass(frozen=True)
class Needle(Task):
    """Needles in a haystack as in RULER (arXiv:2404.06654).

    ``single``: one. ``multi_key``: several, each with another key, one of which is asked for. ``multi_value``: several
    with the same key, all asked for. ``multi_query``: several keys, all asked for at once. The embedded models'
    language asks for one key after another, and cannot say ``multi_value``. Those asked for stand together at
    ``depth``.

    Attributes:
        variant: one of the four.
        needles: needles of the variants that have several; 4 by default, as in the paper.
        questions: how many needles of ``multi_key`` are asked for, in one question each.
    """

    paper = "arXiv:2404.06654"
    cases = (
        {},
        {"variant": "multi_key", "needles": 5, "questions": 3},
        {"variant": "multi_value"},
        {"variant": "multi_query", "needles": 3},
    )
    text_only = False

    variant: str = field(default="single", metadata={"choices": VARIANTS})
    needles: int | None = field(default=None, metadata={"min": 2, "max": 512, "unit": "needles"})
    questions: int = field(default=1, metadata={"min": 1, "max": 512, "unit": "questions"})

    def __post_init__(self) -> None:
        if self.variant == "single" and self.needles is not None:
            raise ConfigError(f"needles: got {self.needles}, but variant 'single' has one; choose a multi variant.")
        if self.questions > 1 and (self.variant != "multi_key" or self.questions > self.count):
            raise ConfigError(
                f"questions: got {self.questions}; only multi_key asks more than one, of at most its {self.count} "
                f"needles (variant is {self.variant!r})."
            )

    @property
    def count(self) -> int:
        """Needles in all."""
        return 1 if self.variant == "single" else self.needles or 4

    def check_tiny(self) -> None:
        if self.variant == "multi_value":
            others = ", ".join(variant for variant in VARIANTS if variant != self.variant)
            raise ConfigError(f"variant: got 'multi_value', the embedded models' language can say: {others}.")

    def draft(self, language, length, depth, rng) -> Draft:
        count = self.count
        facts = rng(0)
        keys, values = language.draw(facts, count, ONE)
        wording = {"multi_value": VALUE, "multi_query": QUERY}.get(self.variant, ONE)
        if self.variant == "multi_value":
            keys = keys[:1] * count
        several = self.variant in ("multi_value", "multi_query")
        asked = facts.permutation(count)[: count if several else self.questions].tolist()
        groups = [asked] if several and language.joint else [[i] for i in asked]
        questions = [
            self.question(
                language, language.ask(wording, list(dict.fromkeys(keys[i] for i in one))), [values[i] for i in one]
            )
            for one in groups
        ]
        return scattered(self, language, wording, (keys, values), asked, questions, length, depth, rng)
