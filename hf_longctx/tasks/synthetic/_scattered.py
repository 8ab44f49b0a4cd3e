"""Facts between the sentences of the filler, some of which are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..base import Draft, Question, Rng, Task
from ..documents import place
from ..language import Language, Wording


def scattered(
    task: Task,
    language: Language,
    wording: Wording,
    facts: tuple[Sequence[str], Sequence[str]],
    asked: Sequence[int],
    questions: Sequence[Question],
    length: int,
    depth: float | None,
    rng: Rng,
) -> Draft:
    """A context with every fact somewhere in it; those asked for stand together at ``depth``, if one is given.

    Args:
        facts: keys and values, one of each per fact.
        asked: indices of the facts that the questions are about.

    Raises:
        ConfigError: ``length`` has no room.
    """
    keys, values = facts
    spread = rng(1)

    def places(free: int) -> np.ndarray:
        before = spread.permutation(place(spread, free, len(keys), None))
        if depth is not None:
            before[list(asked)] = round(depth * free)
        return before

    pieces = [language.tell(wording, key, value) for key, value in zip(keys, values, strict=True)]
    context, spans = task.hide(language, length, language.intro(wording), pieces, questions, places, rng(2))
    return Draft(context, questions, [spans[i] for i in asked])
