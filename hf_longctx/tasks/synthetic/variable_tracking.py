"""``variable_tracking``: which variables hold a value that was handed from one to the next."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .._words import coded, passkeys
from ..base import Draft, Task, chain
from ..language import Wording

WORDING = Wording(
    intro="Variables are assigned in the text below. Keep track of their values.\n\nText:",
    tell=" VAR {key} = {value}.",
    ask="Which variables hold the value {key}, assigned directly or through other variables?",
    lead="The variables that hold the value {key} are",
    keys=coded,
    values=passkeys,
)


@dataclass(frozen=True)
class VariableTracking(Task):
    """Chains of assignments as in RULER (arXiv:2404.06654): all variables with the value of the first chain.

    The assignments of a chain stand in their order; the last one of the chain asked for is at ``depth``, the others
    anywhere before it.

    Attributes:
        chains: chains with different values, of which one is asked for.
        hops: assignments in a chain after its first.
    """

    paper = "arXiv:2404.06654"
    cases = ({}, {"chains": 3, "hops": 2})

    chains: int = field(default=1, metadata={"min": 1, "max": 64, "unit": "chains"})
    hops: int = field(default=4, metadata={"min": 1, "max": 256, "unit": "assignments"})

    def draft(self, language, length, depth, rng) -> Draft:
        each = self.hops + 1
        names, _ = language.draw(rng(0), self.chains * each, WORDING)
        values = WORDING.values(rng(3), self.chains)
        told = [f"VAR {names[i - 1]}" if i % each else values[i // each] for i in range(len(names))]
        pieces = [language.tell(WORDING, name, value) for name, value in zip(names, told, strict=True)]
        prompt = language.ask(WORDING, [values[0]])
        question = self.question(language, prompt, names[:each], [2] * self.hops + [1])
        spread = rng(1)

        def places(free: int) -> np.ndarray:
            return np.concatenate([chain(spread, free, each, None if i else depth) for i in range(self.chains)])

        intro = language.intro(WORDING)
        context, spans = self.hide(language, length, intro, pieces, [question], places, rng(2))
        return Draft(context, [question], spans[:each])
