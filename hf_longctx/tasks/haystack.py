"""Text to hide things in: a user's files, sentences, random tokens of any tokenizer, or the embedded models' filler."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..config.words import wrong
from ..errors import ConfigError
from . import tiny_language
from ._words import sentences


class Haystack(ABC):
    """A source of token ids without end."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """``length`` token ids, int64 ``[length]``."""


class TextHaystack(Haystack):
    """Pieces of a text, from a random place on; a text that is too short starts again from its beginning."""

    def __init__(self, ids: Sequence[int]):
        self.ids = np.asarray(ids, dtype=np.int64)

    @classmethod
    def read(cls, tokenizer, path: str | os.PathLike) -> TextHaystack:
        """The text of a file, or of all .txt and .md files under a folder, in the order of their names.

        Raises:
            ConfigError: nothing is there to read, or the file is no UTF-8 text.
        """
        path = Path(path)
        files = (
            sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file())
            if path.is_dir()
            else [path]
        )
        try:
            text = "\n\n".join(file.read_text("utf-8") for file in files)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"text: {path} cannot be read: {error}") from None
        # What looks like a special token in a text is words about one: it must not end the context or a chat's turn.
        plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        ids = tokenizer(text, **plain)["input_ids"] if text.strip() else []
        if not ids:
            raise ConfigError(f"text: {path} holds no text (a folder is searched for .txt and .md files).")
        return cls(ids)

    def sample(self, rng: np.random.Generator, length: int) -> np.ndarray:
        first = rng.integers(0, max(1, len(self.ids) - length + 1))
        return self.ids[np.arange(first, first + length) % len(self.ids)]


class TokenNoise(Haystack):
    """Tokens drawn independently from ``vocabulary`` (token ids)."""

    def __init__(self, vocabulary: Sequence[int]):
        self.vocabulary = np.asarray(vocabulary, dtype=np.int64)

    def sample(self, rng: np.random.Generator, length: int) -> np.ndarray:
        return rng.choice(self.vocabulary, size=length)


class Sentences(Haystack):
    """Sentences about nothing, from the beginning of one on.

    Args:
        encode: text to token ids, as they are in the middle of a text.
    """

    def __init__(self, encode: Callable[[str], list[int]]):
        self.encode = encode

    def sample(self, rng: np.random.Generator, length: int) -> np.ndarray:
        ids: list[int] = []
        while len(ids) < length:
            more = sentences(rng, (length - len(ids)) // 8 + 2)
            ids += self.encode("".join(f" {sentence}" for sentence in more))
        return np.asarray(ids[:length], dtype=np.int64)


class TinyFiller(Haystack):
    """The filler of the embedded models' language."""

    def __init__(self) -> None:
        self.filler = tiny_language.Filler()

    def sample(self, rng: np.random.Generator, length: int) -> np.ndarray:
        return self.filler.sample(rng, 1, length)[0]


def weave(filler: Sequence[int], before: Sequence[int], pieces: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """(``filler`` with ``pieces`` in it, where each piece begins).

    Args:
        before: filler tokens before each piece, ascending.
    """
    ids = []
    starts = []
    done = 0
    for piece, at in zip(pieces, before, strict=True):
        ids.extend(filler[done:at])
        starts.append(len(ids))
        ids.extend(piece)
        done = at
    ids.extend(filler[done:])
    return ids, starts


def check_tokenizer(tokenizer) -> None:
    """Raise ConfigError unless texts can be read and written with it."""
    if not callable(tokenizer) or not hasattr(tokenizer, "get_vocab"):
        raise wrong("tokenizer", tokenizer, "the model's own, e.g. AutoTokenizer.from_pretrained(NAME)")


def ordinary_tokens(tokenizer) -> np.ndarray:
    """Ids of the tokens that are neither special nor added: what ordinary text is made of.

    Raises:
        ConfigError: the tokenizer has fewer than 32 of them.
    """
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    ids = np.asarray(sorted(set(tokenizer.get_vocab().values()) - special), dtype=np.int64)
    if len(ids) < 32:
        raise ConfigError(f"tokenizer: it has {len(ids)} ordinary tokens; at least 32 are needed to draw texts from.")
    return ids


def special_texts(tokenizer) -> set[str]:
    """What the tokenizer would read in a text as a token that is none of a text."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def word_tokens(tokenizer, ids: np.ndarray) -> np.ndarray:
    """Those of ``ids`` that stand for one word of letters with a space before it; all of ``ids`` where few do."""
    texts = tokenizer.convert_ids_to_tokens(ids.tolist())
    marked = [bool(text) and text[0] in "▁Ġ" and len(text) > 3 and text[1:].isalpha() for text in texts]
    words = ids[np.asarray(marked)]
    return words if len(words) >= 256 else ids


def is_tiny_language(tokenizer) -> bool:
    """Whether this is the tokenizer of the embedded models."""
    return len(tokenizer) == len(tiny_language.VOCAB) and tokenizer.get_vocab() == {
        word: i for i, word in enumerate(tiny_language.VOCAB)
    }
