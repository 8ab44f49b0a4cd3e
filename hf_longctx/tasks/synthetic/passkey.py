"""``passkey``: one number in a long text."""

from __future__ import annotations

from dataclasses import dataclass

from .._words import passkeys
from ..base import Draft, Task
from ..documents import place
from ..language import Wording

WORDING = Wording(
    intro="A pass key is hidden in the text below. Remember it, you will be asked for it.\n\nText:",
    tell=" The pass key is {value}. Remember it.",
    ask="What is the pass key in the text?",
    lead="The pass key is",
    values=passkeys,
)


@dataclass(frozen=True)
class Passkey(Task):
    """A number of five digits, told once and asked for at the end (arXiv:2305.16300).

    The embedded models: one note.
    """

    paper = "arXiv:2305.16300"
    text_only = False

    def draft(self, language, length, depth, rng) -> Draft:
        (key,), (value,) = language.draw(rng(0), 1, WORDING)
        question = self.question(language, language.ask(WORDING, [key]), [value])
        pieces = [language.tell(WORDING, key, value)]
        spread = rng(1)
        context, spans = self.hide(
            language,
            length,
            language.intro(WORDING),
            pieces,
            [question],
            lambda free: place(spread, free, 1, depth),
            rng(2),
        )
        return Draft(context, [question], spans)
