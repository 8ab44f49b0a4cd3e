"""Tasks over texts of the user's own: nothing is drawn, and a length is the most tokens that a prompt may have."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar
from weakref import WeakKeyDictionary

import numpy as np

from ..config.bounds import TOKENS
from ..errors import ConfigError
from .base import SEED, Draft, Question, Rng, Task
from .language import Language, Wording
from .metrics import METRICS

WORDING = Wording(intro="", tell="", ask="{key}", lead="Answer:")
ROOM = 64  # tokens that an answer may have, where the expected ones do not need more
_READ: WeakKeyDictionary[Language, dict[OwnTask, list[tuple[OwnText, int]]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class OwnText:
    """A text and a question about it.

    Attributes:
        id: what it is called in the records.
        answers: what is right; the first is the expected one where a model is forced to say it.
    """

    id: str
    context: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class OwnTask(Task):
    """A task that asks the user's questions about the user's texts, in full or not at all.

    ``make`` takes the text whose place among those of at most ``length`` tokens is ``seed``; after the last it begins
    again. The prompt is the context, a blank line, the question and "Answer:", in the chat template where there is one.

    Attributes:
        metric: how answers are scored; ``string_match_any`` wants one of a text's answers in the output.
        room: tokens that an answer may have; None: 64, or more where an expected answer is long.
    """

    own: ClassVar[bool] = True
    deep: ClassVar[bool] = False
    cases: ClassVar[tuple[Mapping, ...]] = ()

    metric: str = field(default="string_match_any", metadata={"choices": tuple(METRICS)})
    room: int | None = field(default=None, metadata=TOKENS)

    @abstractmethod
    def read(self) -> Sequence[OwnText]:
        """All texts, in an order that stays.

        Raises:
            ConfigError: they cannot be read.
        """

    def texts(self, language: Language) -> list[tuple[OwnText, int]]:
        """(text, tokens of its prompt); read once per language, so that a change on the disk does not change a run.

        Raises:
            ConfigError: they cannot be read, or the language cannot say them.
        """
        self.check(language)
        kept = _READ.setdefault(language, {})
        if self not in kept:
            kept[self] = [(one, sum(map(len, _said(language, one)))) for one in self.read()]
        return kept[self]

    def chosen(self, language: Language, lengths: Sequence[int], samples: int, seed: int) -> dict[int, list[int]]:
        """For each of ``lengths`` the seeds that ``make`` makes at most ``samples`` different prompts of.

        They are of an order that ``seed`` shuffles. No text is in two lengths: it belongs to the shortest that it fits.

        Raises:
            ConfigError: a length without a text.
        """
        sizes = [tokens for _, tokens in self.texts(language)]
        order = np.random.default_rng(seed).permutation(len(sizes)).tolist()
        found = {}
        below = 0
        for length in sorted(lengths):
            place = {i: n for n, i in enumerate(i for i, tokens in enumerate(sizes) if tokens <= length)}
            found[length] = [place[i] for i in order if below < sizes[i] <= length][:samples]
            if not found[length]:
                raise self.none_of(language, length, below)
            below = length
        return found

    def notes(self, language: Language, chosen: Mapping[int, Sequence[int]], samples: int) -> tuple[str, ...]:
        """What became of the texts: how long those of each length really are, and how many were left out."""
        sizes = [tokens for _, tokens in self.texts(language)]
        said = []
        for length, seeds in chosen.items():
            fits = [tokens for tokens in sizes if tokens <= length]
            real = [fits[i] for i in seeds]
            few = f", all there are of the {samples} asked for" if len(real) < samples else ""
            prompts = "1 prompt" if len(real) == 1 else f"{len(real)} prompts"
            said.append(f"length {length}: {prompts} of {min(real)} to {max(real)} tokens{few}")
        if over := [tokens for tokens in sizes if tokens > max(chosen)]:
            said.append(
                f"{len(over)} of {len(sizes)} texts have more than {max(chosen)} tokens and were left out; the longest "
                f"has {max(over)}"
            )
        return tuple(said)

    def none_of(self, language: Language, length: int, below: int = 0) -> ConfigError:
        """The error for a length without a text, to be raised by the caller."""
        sizes = [tokens for _, tokens in self.texts(language)]
        do = f"give a length of {min(sizes)} or more" if min(sizes) > length else f"leave {length} out"
        return ConfigError(
            f"length: no prompt of {self.name} has {below + 1} to {length} tokens. With this tokenizer the shortest "
            f"has {min(sizes)}, the longest {max(sizes)}; {do}."
        )

    def drawn(self, language: Language, length: int, depth: float | None, seed: int) -> Draft:
        fits = [(one, tokens) for one, tokens in self.texts(language) if tokens <= length]
        if not fits:
            raise self.none_of(language, length)
        one, tokens = fits[seed % len(fits)]
        context, prompt = _said(language, one)
        text = language.decode(context).casefold()
        target = np.asarray(language.target(prompt, one.answers[:1]), dtype=np.int64)
        room = self.room or max(ROOM, *(language.room([answer]) for answer in one.answers))
        told = tuple(text.count(answer.casefold()) for answer in one.answers)
        question = Question(np.asarray(prompt, dtype=np.int64), one.answers, self.metric, room, told, target)
        return Draft(context, [question], about={"id": one.id, "tokens": tokens})

    def draft(self, language: Language, length: int, depth: float | None, rng: Rng) -> Draft:
        return self.drawn(language, length, depth, int(rng(0).integers(SEED["max"])))


def _said(language: Language, one: OwnText) -> tuple[list[int], list[int]]:
    """Token ids of the context, and of the question up to where the answer begins."""
    return [*language.prefix, *language.encode(one.context)], language.ask(WORDING, [one.question])
