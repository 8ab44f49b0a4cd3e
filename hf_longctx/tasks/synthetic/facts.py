"""``facts``: plain English about several people, who must be told apart."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import ConfigError
from .._words import people, prices, years
from ..base import Draft, Task
from ..language import Wording
from ._scattered import scattered

INTRO = "Read the text below. You will be asked about some of the people in it.\n\nText:"
KINDS = {
    "born": Wording(
        intro=INTRO,
        tell=" {key} was born in the year {value}.",
        ask="In which year was {key} born?",
        lead="{key} was born in the year",
        keys=people,
        values=years,
    ),
    "built": Wording(
        intro=INTRO,
        tell=" The house of {key} was built in the year {value}.",
        ask="When was the house of {key} built?",
        lead="The house of {key} was built in the year",
        keys=people,
        values=years,
    ),
    "paid": Wording(
        intro=INTRO,
        tell=" {key} sold the farm for {value} pounds.",
        ask="For how many pounds did {key} sell the farm?",
        lead="{key} sold the farm for",
        keys=people,
        values=prices,
    ),
}


@dataclass(frozen=True)
class Facts(Task):
    """The same kind of fact about several people, in sentences between those of the text, and a question about each.

    RULER's multi-key needles (arXiv:2404.06654) in plain English: when someone was born, when a house was built, what
    a farm was sold for. With ``haystack=book`` nothing but the facts is made up. Those asked for stand together at
    ``depth``.

    Attributes:
        kind: "born", "built" or "paid"; None: one of them by chance, the same for all people of a text.
        facts: people in a text.
        questions: how many of them are asked for, in one question each; None: all.
    """

    paper = "arXiv:2404.06654"
    cases = ({}, {"kind": "built", "facts": 4, "questions": 2}, {"kind": "paid"}, {"kind": "born"})

    kind: str | None = field(default=None, metadata={"choices": tuple(KINDS)})
    facts: int = field(default=6, metadata={"min": 1, "max": 24, "unit": "facts"})
    questions: int | None = field(default=None, metadata={"min": 1, "max": 24, "unit": "questions"})

    def __post_init__(self) -> None:
        if self.questions is not None and self.questions > self.facts:
            raise ConfigError(f"questions: got {self.questions}, but a text has {self.facts} facts; ask fewer.")

    def draft(self, language, length, depth, rng) -> Draft:
        drawn = rng(0)
        kinds = list(KINDS)
        wording = KINDS[self.kind or kinds[drawn.integers(len(kinds))]]
        keys, values = language.draw(drawn, self.facts, wording)
        asked = drawn.permutation(self.facts)[: self.questions].tolist()
        questions = [self.question(language, language.ask(wording, [keys[i]]), [values[i]]) for i in asked]
        return scattered(self, language, wording, (keys, values), asked, questions, length, depth, rng)
