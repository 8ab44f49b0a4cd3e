"""A context full of pairs of a key and a value: a JSON object, or notes of the embedded models' language."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .._fit import largest
from ..base import Draft, Question, Rng, Task
from ..language import Language, Wording

Pairs = Sequence[tuple[str, str]]
# n -> (n pairs, their questions, which pairs are asked for)
Build = Callable[[int], tuple[Pairs, Sequence[Question], Sequence[int]]]


@dataclass(frozen=True)
class Listing:
    """Some pairs in token ids."""

    pieces: Sequence[Sequence[int]]
    questions: Sequence[Question]
    asked: Sequence[int]
    cost: int


def listing(task: Task, language: Language, wording: Wording, build: Build, least: int, length: int, rng: Rng) -> Draft:
    """A context of as many pairs as ``length`` has room for; filler before them makes it exact.

    Args:
        least: pairs that the task needs.

    Raises:
        ConfigError: ``length`` has no room for them.
    """
    intro = language.intro(wording)
    before, after = language.around(wording)
    fixed = len(language.prefix) + len(intro) + len(before) + len(after)

    def listed(n: int) -> Listing:
        pairs, questions, asked = build(n)
        pieces = [language.tell(wording, key, value, i == n - 1) for i, (key, value) in enumerate(pairs)]
        longest = max(len(question.prompt) for question in questions)
        return Listing(pieces, questions, asked, fixed + longest + sum(map(len, pieces)))

    made = largest(listed, lambda one: one.cost, least, length)
    if made.cost > length:
        raise task.too_short(length, made.cost)
    context = [*language.prefix, *language.padding(rng(9), length - made.cost), *intro, *before]
    begins = []
    for piece in made.pieces:
        begins.append(len(context))
        context += piece
    spans = [(begins[i], begins[i] + len(made.pieces[i])) for i in made.asked]
    return Draft([*context, *after], made.questions, spans)
