"""What a task is said in: text of any tokenizer, or the small language of the embedded models."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config.words import check_word
from ..errors import ConfigError
from . import HAYSTACKS, tiny_language
from ._words import Words, ids, names
from .haystack import (
    Haystack,
    Sentences,
    TextHaystack,
    TinyFiller,
    TokenNoise,
    check_tokenizer,
    is_tiny_language,
    ordinary_tokens,
    special_texts,
)

REACH = 128  # tokens that a fact moves towards the beginning, to stand between two sentences
SAID = "0123456789abcdefghijklmnopqrstuvwxyz"
OPEN = "\"'([ \n"  # characters after which an answer needs no space


@dataclass(frozen=True)
class Wording:
    """How text tells facts and asks for them; the embedded models' language has one way and needs none of this.

    Attributes:
        intro: what the context begins with.
        tell: a fact; ``{key}`` and ``{value}`` stand for what they say.
        ask: the question; ``{key}`` stands for the key, or for "a, b and c".
        lead: the beginning of the answer, which the model goes on from.
        keys, values: what they are made of.
        before, last, after: around a list of facts, and how its last one is told where that is another way.
    """

    intro: str
    tell: str
    ask: str
    lead: str
    keys: Words = names
    values: Words = ids
    before: str = ""
    last: str | None = None
    after: str = ""


class Language(ABC):
    """Says facts, questions and filler in token ids.

    Attributes:
        prefix: ids that every prompt begins with.
        between: ids between an answer and the next question.
        stop: ids that end an answer, beside those of the model.
        apart: ids that part two texts.
        joint: whether one question can ask for several facts.
        haystack: where the filler comes from.
        longest: tokens that the models of this language were trained for, where that is known.
    """

    prefix: list[int]
    between: list[int]
    stop: tuple[int, ...] = ()
    apart: tuple[int, ...] = ()
    joint: bool = True
    haystack: Haystack
    longest: int | None = None

    @abstractmethod
    def draw(self, rng: np.random.Generator, count: int, wording: Wording) -> tuple[list[str], list[str]]:
        """``count`` different keys and values."""

    @abstractmethod
    def intro(self, wording: Wording) -> list[int]:
        """What the context says first, after ``prefix``."""

    @abstractmethod
    def around(self, wording: Wording) -> tuple[list[int], list[int]]:
        """What stands before and after a list of facts."""

    @abstractmethod
    def tell(self, wording: Wording, key: str, value: str, last: bool = False) -> list[int]:
        """One fact; ``last``: of a list."""

    @abstractmethod
    def ask(self, wording: Wording, keys: Sequence[str]) -> list[int]:
        """The question for the values of ``keys``, up to where the answer begins."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""

    @abstractmethod
    def target(self, prompt: Sequence[int], answers: Sequence[str]) -> list[int]:
        """Ids of the answers, as the model is expected to say them after ``prompt``."""

    @abstractmethod
    def room(self, answers: Sequence[str]) -> int:
        """Tokens that an answer may have."""

    def filler(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """``length`` tokens of the haystack."""
        return self.haystack.sample(rng, length)

    def padding(self, rng: np.random.Generator, length: int) -> list[int]:
        """``length`` tokens of filler that end apart from what follows, where there is room for that."""
        apart = self.apart[:length]
        return [*self.filler(rng, length - len(apart)).tolist(), *apart]

    def seams(self, filler: np.ndarray, before: np.ndarray) -> np.ndarray:
        """Places ``before`` (ascending) in the filler, moved to where something can be put in."""
        return before


class TextLanguage(Language):
    """Text, for any tokenizer.

    Pieces are encoded one by one, as they are in the middle of a text, and joined as ids; so a prompt can have an exact
    number of tokens.

    Args:
        text: a file or folder to take the filler from.
        haystack: "sentences" (made up), "book" (a novel that ships with the package) or "noise" (random tokens), where
            there is no text; default sentences.
        chat: put the tokenizer's chat template around every question.

    Raises:
        ConfigError: an unknown haystack, or one beside ``text``; the text cannot be read; the tokenizer cannot say
            letters and digits, or has no chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        haystack: str | None = None,
        text: str | os.PathLike | None = None,
        chat: bool = False,
    ):
        if haystack is not None:
            check_word(haystack, HAYSTACKS, "haystack")
            if text is not None:
                raise ConfigError(f"haystack: {haystack!r} and a text were given; the filler comes from one of them.")
        self.tokenizer = tokenizer
        self._ends: dict[int, bool] = {}
        self._special = special_texts(tokenizer)
        self._anchor = self._plain(".")
        self._check()
        self.apart = tuple(self.encode("\n\n"))
        if haystack == "book":
            from ..assets import BOOK as text
        if text is not None:
            self.haystack = TextHaystack.read(tokenizer, text)
        else:
            self.haystack = TokenNoise(ordinary_tokens(tokenizer)) if haystack == "noise" else Sentences(self.encode)
        self.prefix, self.suffix, self.between = self._chat() if chat else (self._begin(), [], self.encode("\n"))

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text inside a longer one; what looks like a special token is words about one."""
        # Not every tokenizer knows this argument, and hardly any text needs it.
        how = {"split_special_tokens": True} if any(token in text for token in self._special) else {}
        ids = self._plain("." + text, **how)
        first = len(self._anchor)
        # Where the tokenizer joins the full stop to what follows, the piece has to stand alone.
        return ids[first:] if ids[:first] == self._anchor else self._plain(text, **how)

    def draw(self, rng, count, wording):
        return wording.keys(rng, count), wording.values(rng, count)

    def intro(self, wording):
        return self.encode(wording.intro)

    def around(self, wording):
        return self.encode(wording.before), self.encode(wording.after)

    def tell(self, wording, key, value, last=False):
        said = wording.last if last and wording.last is not None else wording.tell
        return self.encode(said.format(key=key, value=value))

    def ask(self, wording, keys):
        key = listed(keys)
        asked, lead = (one.format(key=key) for one in (wording.ask, wording.lead))
        return [*self.encode(f"\n\n{asked}"), *self.suffix, *self.encode(lead if self.suffix else f"\n{lead}")]

    def decode(self, ids):
        return self.tokenizer.decode(
            np.asarray(ids).tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def target(self, prompt, answers):
        return self.encode(parted(self.decode(prompt[-8:]), listed(answers)))

    def room(self, answers):
        return 2 * len(self.encode(" " + ", ".join(answers))) + 16

    def seams(self, filler, before):
        ends = [i for i in np.unique(filler).tolist() if self._ends_sentence(i)]
        breaks = np.concatenate([[0], 1 + np.flatnonzero(np.isin(filler, ends))])
        moved = breaks[np.searchsorted(breaks, before, side="right") - 1]
        return np.where(before - moved <= REACH, moved, before)

    def _ends_sentence(self, token: int) -> bool:
        if token not in self._ends:
            self._ends[token] = self.tokenizer.decode([token]).rstrip(" ").endswith((".", "!", "?", "\n"))
        return self._ends[token]

    def _plain(self, text: str, **how: Any) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **how)["input_ids"]

    def _begin(self) -> list[int]:
        """What the tokenizer puts before a text by itself."""
        plain = self._plain("a")
        full = self.tokenizer("a")["input_ids"]
        starts = (i for i in range(len(full)) if full[i : i + len(plain)] == plain)
        return full[: next(starts, 0)]

    def _check(self) -> None:
        back = self.decode(self._plain(SAID)).casefold().replace(" ", "")
        if back != SAID:
            raise ConfigError(
                f"tokenizer: it reads {SAID!r} back as {back!r}; the tasks' keys and values need letters and digits."
            )

    def _chat(self) -> tuple[list[int], list[int], list[int]]:
        """Ids before a first question, from a question to its answer, and from an answer to the next question."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError("chat: this tokenizer has no chat template; leave chat out.")
        first, answer, second = (f"part{i}" for i in ("one", "two", "three"))
        asks = [{"role": "user", "content": first}]
        again = [*asks, {"role": "assistant", "content": answer}, {"role": "user", "content": second}]
        once, twice = (
            self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
            for said in (asks, again)
        )
        if once.count(first) != 1 or any(twice.count(said) != 1 for said in (answer, second)):
            raise ConfigError("chat: this tokenizer's chat template does not repeat what is said exactly once.")
        before, after = once.split(first)
        between = twice.split(answer)[1].split(second)[0]
        return self._plain(before), self._plain(after), self._plain(between)


class TinyLanguage(Language):
    """The language of the embedded models: notes, and questions about one note each."""

    joint = False
    longest = 4096

    def __init__(self, haystack: Haystack | None = None):
        self.haystack = haystack or TinyFiller()
        self.prefix = [tiny_language.BOS]
        self.between = [tiny_language.END]
        self.stop = (tiny_language.END,)
        self._ids = {word: i for i, word in enumerate(tiny_language.VOCAB)}

    def draw(self, rng, count, wording):
        most = len(tiny_language.CODES) ** 2
        if count > most:
            raise ConfigError(
                f"length: it has room for more than the {most} different notes there are; use a shorter one."
            )
        keys, values = tiny_language.draw_notes(rng, count)
        return [self.decode(key) for key in keys], [self.decode(value) for value in values]

    def intro(self, wording):
        return []

    def around(self, wording):
        return [], []

    def tell(self, wording, key, value, last=False):
        return tiny_language.note(self._encode(key), self._encode(value))

    def ask(self, wording, keys):
        (key,) = keys
        return tiny_language.question(self._encode(key), [])[:-1]

    def decode(self, ids):
        return " ".join(tiny_language.VOCAB[i] for i in ids)

    def target(self, prompt, answers):
        return self._encode(answers[0])

    def room(self, answers):
        return len(self._encode(answers[0])) + 1  # and the full stop

    def _encode(self, words: str) -> list[int]:
        return [self._ids[word] for word in words.split()]


def parted(before: str, answer: str) -> str:
    """The answer with a space before it, but not inside of a quote, nor after a space or a line's end."""
    return answer if before[-1:] in tuple(OPEN) else f" {answer}"


def listed(words: Sequence[str]) -> str:
    """The words as "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def language_for(
    tokenizer: Any, haystack: str | None = None, text: str | os.PathLike | None = None, chat: bool = False
) -> Language:
    """The language of a tokenizer: the embedded models' own, else text; arguments as ``TextLanguage``.

    Raises:
        ConfigError: no tokenizer, ``haystack`` or ``chat`` for the embedded models' language, or as ``TextLanguage``.
    """
    check_tokenizer(tokenizer)
    if not is_tiny_language(tokenizer):
        return TextLanguage(tokenizer, haystack, text, chat)
    if haystack is not None or chat:
        raise ConfigError(
            f"{'chat' if chat else 'haystack'}: the embedded models' language has no chat and one filler of its own; "
            "leave it out."
        )
    return TinyLanguage(None if text is None else TextHaystack.read(tokenizer, text))
