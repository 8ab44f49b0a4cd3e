"""A context that is one long list of words, of which the most frequent are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .._fit import largest
from ..base import Draft, Rng, Task
from ..language import TextLanguage, Wording

# n -> (words in the order of the list, the most frequent ones, how often each of them stands in it)
Build = Callable[[int], tuple[Sequence[str], Sequence[str], Sequence[int]]]


def counting(
    task: Task, language: TextLanguage, wording: Wording, build: Build, least: int, length: int, rng: Rng
) -> Draft:
    """The longest list that ``length`` has room for; filler before it makes it exact.

    Raises:
        ConfigError: ``length`` has no room for ``build(least)``.
    """
    intro = language.intro(wording)

    def listed(n: int) -> tuple[list[int], Sequence[str], Sequence[int], int]:
        words, answers, told = build(n)
        ids = language.encode(" " + " ".join(words))
        prompt = language.ask(wording, [str(len(answers))])
        return ids, answers, told, len(language.prefix) + len(intro) + len(ids) + len(prompt)

    ids, answers, told, cost = largest(listed, lambda made: made[-1], least, length)
    if cost > length:
        raise task.too_short(length, cost)
    question = task.question(language, language.ask(wording, [str(len(answers))]), answers, told)
    return Draft([*language.prefix, *language.padding(rng(9), length - cost), *intro, *ids], [question])
