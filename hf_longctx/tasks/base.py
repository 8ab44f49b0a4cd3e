"""The base of every task, and what a task makes.

A word of ``synthetic/`` names a frozen dataclass in the file of the same name. Its fields are the task's options.
"""

from __future__ import annotations

import dataclasses
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ..config.bounds import TOKENS
from ..config.words import convert, dump, load, words
from ..errors import ConfigError
from .documents import place
from .haystack import weave
from .language import Language, TinyLanguage
from .metrics import METRICS

LENGTH = TOKENS
DEPTH = {"min": 0.0, "max": 1.0}
SEED = {"min": 0, "max": 2**63 - 1}
DRAWS = 16  # tries until no answer stands in the filler by accident

Rng = Callable[[int], np.random.Generator]


@dataclass(frozen=True)
class Question:
    """One question about a context.

    Attributes:
        prompt: token ids, int64 ``[T]``, up to where the answer begins.
        answers: the texts looked for.
        metric: how they are scored, a name in ``METRICS``.
        room: tokens that an answer may have.
        told: how often each answer stands in the context.
        target: token ids of the expected answer as it goes on from the prompt, int64 ``[A]``, without what ends it;
            of several answers the list of them, in the order asked for.
    """

    prompt: np.ndarray
    answers: tuple[str, ...]
    metric: str
    room: int
    told: tuple[int, ...]
    target: np.ndarray

    def score(self, output: str) -> float:
        """How right the text of an answer is, 0 to 1."""
        return METRICS[self.metric](output, self.answers)


@dataclass(frozen=True)
class Sample:
    """A context and the questions about it, which may be asked in turn or each on its own.

    Attributes:
        context: token ids, int64 ``[T]``.
        questions: at least one; the context and the longest of them have exactly the length asked for, of the user's
            own texts at most that.
        between: token ids between an answer and the next question.
        stop: ids that end an answer, beside those of the model.
        needles: (first token, one past the last) in the context of every fact that is asked for, where there are any.
        metadata: task, length, depth and seed, and what the task says about it; plain data.
    """

    context: np.ndarray
    questions: tuple[Question, ...]
    between: tuple[int, ...]
    stop: tuple[int, ...]
    needles: tuple[tuple[int, int], ...]
    metadata: dict[str, Any]

    @property
    def length(self) -> int:
        """Tokens of the context and the longest question."""
        return len(self.context) + max(len(question.prompt) for question in self.questions)


@dataclass(frozen=True)
class Draft:
    """What a task draws: token ids of the context, its questions, and where the facts are that they ask for.

    ``about`` is what else is recorded of it, plain data.
    """

    context: Sequence[int]
    questions: Sequence[Question]
    needles: Sequence[tuple[int, int]] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task(ABC):
    """What a word of ``tasks/synthetic/`` defines.

    Attributes:
        metric: how answers are scored; ``string_match`` is the share of the answers that are found in the output.
        cases: small settings, fields by name, that together show all it does; the tests run each of them.
    """

    paper: ClassVar[str]
    deep: ClassVar[bool] = True  # whether there is a place in the context that ``depth`` can choose
    text_only: ClassVar[bool] = True  # whether the embedded models' language cannot say it
    own: ClassVar[bool] = False  # whether the texts are the user's and a length is an upper bound: an ``own.OwnTask``
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    metric: str = field(default="string_match", metadata={"choices": tuple(METRICS)})

    @property
    def name(self) -> str:
        """The word and the fields that are not as by default, as ``task_from`` reads them."""
        plain = dump(self, "task")
        own = {f.name: f.default for f in dataclasses.fields(self)}
        said = [f"{key}={value}" for key, value in plain.items() if key != "task" and value != own[key]]
        return ":".join([plain["task"], *said])

    def check(self, language: Language, depth: float | None = None) -> None:
        """Refuse what cannot be made at any length, before anything is drawn.

        Raises:
            ConfigError: ``depth`` is out of bounds or means nothing here, or the language cannot say this task.
        """
        convert(depth, float | None, "depth", DEPTH)
        if depth is not None and not self.deep:
            raise ConfigError(f"depth: {self.name} has no place in the context to choose; leave it out.")
        if isinstance(language, TinyLanguage):
            self.check_tiny()

    def check_tiny(self) -> None:
        """Refuse what the embedded models' language cannot say."""
        if self.text_only:
            fit = ", ".join(word for word in words("tasks.synthetic") if not load("tasks.synthetic", word).text_only)
            raise ConfigError(f"{self.name}: the embedded models' language of notes cannot say this; it has: {fit}.")

    def make(self, language: Language, length: int, depth: float | None = None, seed: int = 0) -> Sample:
        """A sample whose context and longest question have exactly ``length`` tokens; the answer comes after them.

        Of an ``own`` task they have at most so many. It depends on the arguments and the fields alone. The room for an
        answer is not part of the length.

        Args:
            language: of the model's tokenizer, from ``language_for``.
            depth: where the facts asked for are, 0 the beginning and 1 the end of the context; None: anywhere.

        Raises:
            ConfigError: an argument out of bounds, a length without room, a language that cannot say this task, or
                a text that holds the answers by accident.
        """
        convert(length, int, "length", LENGTH)
        convert(seed, int, "seed", SEED)
        self.check(language, depth)
        draft = self.drawn(language, length, depth, seed)
        metadata = {"task": self.name, "length": length, "depth": depth, "seed": seed, **draft.about}
        context = np.asarray(draft.context, dtype=np.int64)
        made = (tuple(draft.questions), tuple(language.between), language.stop, tuple(draft.needles))
        return Sample(context, *made, metadata)

    def drawn(self, language: Language, length: int, depth: float | None, seed: int) -> Draft:
        """The first draw in which no answer stands in the filler as well; as ``make``, with arguments that fit."""
        word = zlib.crc32(dump(self, "task")["task"].encode())
        for draw in range(DRAWS):
            draft = self.draft(
                language, length, depth, lambda stream, draw=draw: np.random.default_rng([seed, word, draw, stream])
            )
            text = language.decode(draft.context).casefold()
            found = [(q.told, tuple(text.count(answer.casefold()) for answer in q.answers)) for q in draft.questions]
            if all(told == counted for told, counted in found):
                return draft
        raise ConfigError(f"{self.name}: in {DRAWS} draws an answer stood in the filler as well; use another text.")

    @abstractmethod
    def draft(self, language: Language, length: int, depth: float | None, rng: Rng) -> Draft:
        """One draw; ``rng(i)`` is the i-th of independent generators, 0 and up.

        Raises:
            ConfigError: ``length`` has no room.
        """

    def question(
        self, language: Language, prompt: Sequence[int], answers: Sequence[str], told: Sequence[int] | int = 1
    ) -> Question:
        """A question with this task's metric."""
        told = (told,) * len(answers) if isinstance(told, int) else tuple(told)
        target = np.asarray(language.target(prompt, answers), dtype=np.int64)
        prompt = np.asarray(prompt, dtype=np.int64)
        return Question(prompt, tuple(answers), self.metric, language.room(answers), told, target)

    def too_short(self, length: int, needed: int) -> ConfigError:
        """The error for a length without room, to be raised by the caller."""
        return ConfigError(f"length: got {length} tokens, but {self.name} needs at least {needed} with this tokenizer.")

    def hide(
        self,
        language: Language,
        length: int,
        intro: Sequence[int],
        pieces: Sequence[Sequence[int]],
        questions: Sequence[Question],
        places: Callable[[int], np.ndarray],
        rng: np.random.Generator,
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """(context, span of every piece): filler with ``pieces`` in it.

        Args:
            places: from the number of filler tokens, how many of them stand before each piece.

        Raises:
            ConfigError: ``length`` has no room.
        """
        head = [*language.prefix, *intro]
        fixed = len(head) + sum(map(len, pieces)) + max(len(question.prompt) for question in questions)
        if length < fixed:
            raise self.too_short(length, fixed)
        before = np.asarray(places(length - fixed))
        order = np.argsort(before, kind="stable")
        filler = language.filler(rng, length - fixed)
        at = language.seams(filler, before[order])
        ids, starts = weave(filler.tolist(), at.tolist(), [pieces[i] for i in order])
        begins = np.empty(len(pieces), dtype=np.int64)
        begins[order] = np.asarray(starts, dtype=np.int64) + len(head)
        spans = [(int(begin), int(begin) + len(piece)) for begin, piece in zip(begins, pieces, strict=True)]
        return [*head, *ids], spans


def chain(rng: np.random.Generator, free: int, count: int, depth: float | None) -> np.ndarray:
    """Filler tokens before each of ``count`` facts that follow one from another: the last is at ``depth``."""
    if depth is None:
        return place(rng, free, count, None)
    end = round(depth * free)
    return np.append(place(rng, end, count - 1, None), end)
