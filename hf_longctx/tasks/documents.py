"""Long documents with facts hidden in them that are asked for at the end, for any tokenizer.

The answers are part of the document (teacher forcing), so one forward pass answers every question: a token of an answer
is right when it is the greedy choice after everything before it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import ConfigError
from . import tiny_language
from .haystack import (
    Haystack,
    TextHaystack,
    TinyFiller,
    TokenNoise,
    check_tokenizer,
    is_tiny_language,
    ordinary_tokens,
    weave,
    word_tokens,
)
from .language import Language, TextLanguage


@dataclass(frozen=True)
class Document:
    """One text with ``n`` facts and, at its end, ``n`` questions that are answered.

    Attributes:
        ids: int64 ``[T]``.
        answers: positions of the answers' tokens, ``[n, A]``.
        needles: positions of the same tokens where the facts are told, ``[n, A]``.
        questions: where each question begins and where its answer does, ``[n, 2]``.
        facts: where all that tells the fact begins, and where it has ended, ``[n, 2]``.
    """

    ids: np.ndarray
    answers: np.ndarray
    needles: np.ndarray
    questions: np.ndarray
    facts: np.ndarray


class Documents(ABC):
    """Makes documents of any length.

    Attributes:
        facts: how many facts a document has by default.
        longest: tokens that the models of this language were trained for, where that is known.
        haystack: where the filler comes from.
        null: a question about no fact, token ids.
    """

    facts: int
    longest: int | None = None
    haystack: Haystack
    null: np.ndarray

    @abstractmethod
    def draw(self, rng: np.random.Generator, length: int, facts: int | None = None, depth: float | None = None):
        """A ``Document`` of exactly ``length`` tokens.

        Args:
            facts: facts hidden in it, at most; fewer where ``length`` has no room for them.
            depth: where the facts are, 0 the beginning and 1 the last place before the questions; None: anywhere.

        Raises:
            ConfigError: ``length`` has no room for one fact.
        """

    @abstractmethod
    def noise(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Tokens ``[length]`` drawn independently, that repeat nothing on purpose."""

    def repeat(self, before: np.ndarray) -> np.ndarray:
        """Token ids that ask for the text so far again; from after ``before`` (token ids) on, unless that is empty."""
        return before

    def fit(self, length: int, facts: int, each: int, fixed: int) -> int:
        """How many of ``facts`` facts of ``each`` tokens have room beside ``fixed`` tokens."""
        room = (length - fixed) // each
        if room < 1:
            raise ConfigError(f"length: got {length} tokens, but a document with one fact needs {fixed + each}.")
        return min(facts, room)


def place(rng: np.random.Generator, free: int, count: int, depth: float | None) -> np.ndarray:
    """Filler tokens before each of ``count`` facts, ascending: spread at random, or together at ``depth``."""
    if depth is None:
        return np.sort(rng.integers(0, free + 1, size=count))
    return np.full(count, round(depth * free))


class TinyDocuments(Documents):
    """Notes in the language of the embedded models."""

    facts = 16
    longest = 4096

    null = np.asarray([tiny_language.ASK, *[tiny_language.FIRST_FILLER] * 2, tiny_language.IS])

    def __init__(self, haystack: Haystack):
        self.haystack = haystack

    def draw(self, rng, length, facts=None, depth=None) -> Document:
        block = tiny_language.BLOCK
        count = self.fit(length, facts or self.facts, 2 * block, 1)
        keys, values = tiny_language.draw_notes(rng, count)
        asked = rng.permutation(count)
        told = [tiny_language.note(k, v) for k, v in zip(keys, values, strict=True)]
        back = [tiny_language.question(keys[i], values[i]) for i in asked]
        before = place(rng, length - 1 - 2 * block * count, count, depth)
        first_question = length - block * count
        starts = 1 + before + block * np.arange(count)
        ids = np.empty(length, dtype=np.int64)
        ids[0], ids[1:] = tiny_language.BOS, self.haystack.sample(rng, length - 1)
        for start, tokens in zip(starts, told, strict=True):
            ids[start : start + block] = tokens
        ids[first_question:] = np.concatenate(back)
        questions = first_question + block * np.arange(count)
        inside = np.arange(4, 8)
        told_at = starts[asked][:, None]
        asked_at = questions[:, None]
        return Document(ids, asked_at + inside, told_at + inside, asked_at + np.array([0, 4]), told_at + [0, block])

    def noise(self, rng, length) -> np.ndarray:
        low = tiny_language.FIRST_CODE
        high = len(tiny_language.VOCAB)
        return rng.integers(low, high, size=length)


class PasskeyDocuments(Documents):
    """Passkeys of random words, numbered, told at random depths and asked back (DuoAttention, arXiv:2410.10819)."""

    facts = 10
    words: ClassVar[int] = 32

    def __init__(self, tokenizer, haystack: Haystack | None):
        ordinary = ordinary_tokens(tokenizer)
        self.tokenizer = tokenizer
        self.vocabulary = word_tokens(tokenizer, ordinary)
        self.haystack = haystack or TokenNoise(ordinary)
        self._intro = [self._encode(tokenizer, f"\nPasskey number {i + 1} is:") for i in range(self.facts)]
        self._end = self._encode(tokenizer, "\nRemember it.\n")
        self.null = np.asarray(self._encode(tokenizer, "\nPasskey number N/A is:"))
        self._again = self._encode(tokenizer, "\n\nWrite the text above again, word by word:\n\n")
        self._part = self._encode(tokenizer, "\n\nWrite the text above again, word by word, from where it says:")
        self._bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def language(self) -> Language:
        """What tasks are said in with this tokenizer: with its chat template, if any, in a book or in the user's text.

        Raises:
            ConfigError: as ``TextLanguage``.
        """
        language = TextLanguage(self.tokenizer, "book", chat=bool(getattr(self.tokenizer, "chat_template", None)))
        if isinstance(self.haystack, TextHaystack):
            language.haystack = self.haystack
        return language

    @staticmethod
    def _encode(tokenizer, text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def _each(self, fact: int) -> int:
        return 2 * (len(self._intro[fact]) + self.words) + len(self._end)

    def draw(self, rng, length, facts=None, depth=None) -> Document:
        wanted = facts or self.facts
        if wanted > self.facts:
            raise ConfigError(f"facts: got {wanted}, supported: at most {self.facts} passkeys.")
        each = max(map(self._each, range(wanted)))
        count = self.fit(length, wanted, each, len(self._bos))
        keys = rng.choice(self.vocabulary, size=(count, self.words))
        asked = rng.permutation(count)
        told = [[*self._intro[i], *keys[i], *self._end] for i in range(count)]
        back = [[*self._intro[i], *keys[i]] for i in asked]
        used = sum(map(len, told)) + sum(map(len, back)) + len(self._bos)
        before = place(rng, length - used, count, depth)
        filler = self.haystack.sample(rng, length - used)
        woven, starts = weave(filler, before, told)
        ids = [*self._bos, *woven]
        intros = [len(self._bos) + len(self._intro[i]) for i in range(count)]
        needles = (np.asarray(starts) + intros)[:, None] + np.arange(self.words)
        ends = [first + len(tokens) for first, tokens in zip(starts, told, strict=True)]
        spans = len(self._bos) + np.stack([starts, ends], 1)
        answers = []
        questions = []
        for i, tokens in zip(asked, back, strict=True):
            answer = len(ids) + len(self._intro[i])
            questions.append([len(ids), answer])
            answers.append(answer + np.arange(self.words))
            ids.extend(tokens)
        ids = np.asarray(ids, dtype=np.int64)
        return Document(ids, np.stack(answers), needles[asked], np.asarray(questions), spans[asked])

    def repeat(self, before) -> np.ndarray:
        return np.asarray([*self._part, *before] if len(before) else self._again)

    def noise(self, rng, length) -> np.ndarray:
        return rng.choice(self.vocabulary, size=length)


class RandomTokens(Documents):
    """For methods that read noise alone, of a model whose tokenizer is not there."""

    def __init__(self, ids: Sequence[int]):
        self.haystack = TokenNoise(ids)

    def draw(self, rng, length, facts=None, depth=None) -> Document:
        raise ConfigError("tokenizer: there is none to write documents with.")

    def noise(self, rng, length) -> np.ndarray:
        return self.haystack.sample(rng, length)


def documents_for(tokenizer, text: str | os.PathLike | None = None) -> Documents:
    """Documents in the tokenizer's language: the embedded models' own notes, else passkeys.

    Args:
        text: a file or a folder to take the filler from; without it random tokens (the embedded models: their filler).

    Raises:
        ConfigError: no tokenizer, the text cannot be read, or the tokenizer has too few ordinary tokens.
    """
    check_tokenizer(tokenizer)
    haystack = None if text is None else TextHaystack.read(tokenizer, text)
    if is_tiny_language(tokenizer):
        return TinyDocuments(haystack or TinyFiller())
    return PasskeyDocuments(tokenizer, haystack)
