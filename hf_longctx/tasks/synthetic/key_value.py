"""``key_value``: values looked up in a long list of pairs."""

from __future__ import annotations

from dataclasses import dataclass, field

from .._words import ids
from ..base import Draft, Question, Task
from ..language import Wording
from ._pairs import Pairs, listing

WORDING = Wording(
    intro="Below is a JSON object with many keys and their values.\n\n",
    tell=' "{key}": "{value}",',
    ask='What is the value of the key "{key}" in the JSON object?',
    lead='The value of the key "{key}" is "',
    keys=ids,
    before="{",
    last=' "{key}": "{value}"',
    after=" }",
)


@dataclass(frozen=True)
class KeyValue(Task):
    """A JSON object of random keys and values that fills the context (arXiv:2307.03172).

    The embedded models: as many notes as fit. The pairs asked for are next to each other at ``depth``.

    Attributes:
        questions: how many keys are asked for, in one question each, not in the order of the object.
    """

    paper = "arXiv:2307.03172"
    cases = ({}, {"questions": 4})
    text_only = False

    questions: int = field(default=1, metadata={"min": 1, "max": 512, "unit": "questions"})

    def draft(self, language, length, depth, rng) -> Draft:
        count = self.questions

        def build(n: int) -> tuple[Pairs, list[Question], list[int]]:
            keys, values = language.draw(rng(0), n, WORDING)
            first = None if depth is None else round(depth * (n - count))
            spread = rng(1)
            asked = spread.choice(n, count, replace=False) if first is None else first + spread.permutation(count)
            questions = [self.question(language, language.ask(WORDING, [keys[i]]), [values[i]]) for i in asked]
            return list(zip(keys, values, strict=True)), questions, asked.tolist()

        return listing(self, language, WORDING, build, count, length, rng)
