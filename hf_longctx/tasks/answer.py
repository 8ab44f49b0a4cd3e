"""Greedy answers to the questions of a sample, with the context read once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..cache.eviction import tell_prompt
from ..cache.seam import CACHE, cache_of
from ..cache.weights import input_device
from ..config.words import check_word, convert
from ..errors import UnsupportedModeError
from . import MODES
from .base import Question, Sample


@torch.no_grad()
def answer(
    model: nn.Module, sample: Sample, mode: str = "requests", max_new_tokens: int | None = None
) -> list[list[int]]:
    """Answer every question of a sample; the context goes through the model once (SCBench, arXiv:2412.10319).

    The cache is the one that the model makes for itself: a ``LongCtxCache`` where it is patched, Transformers' own
    where it is not.

    Args:
        model: a causal language model in eval mode.
        mode: "requests": every question is asked of a copy of the context's cache. "turns": one conversation, in which
            each question follows the model's own answer to the one before and the cache is kept.
        max_new_tokens: tokens of an answer at most; None: each question's own room.

    Returns:
        Token ids of the answers, without the one that ended them; the language decodes them.

    Raises:
        ConfigError: an unknown mode, or ``max_new_tokens`` out of bounds.
        UnsupportedModeError: the model is in training mode.
    """
    check_word(mode, MODES, "mode")
    convert(max_new_tokens, int | None, "max_new_tokens", {"min": 1, "unit": "tokens"})
    if model.training:
        raise UnsupportedModeError("answer() needs the model in eval mode: call model.eval() first.")
    reader = Reader(model, sample.stop)
    reader.read(sample.context)
    return ask_all(reader, sample, mode, max_new_tokens)


def ask_all(reader: Reader, sample: Sample, mode: str, max_new_tokens: int | None = None) -> list[list[int]]:
    """As ``answer``, of a reader that has read the context."""
    answers = []
    for i, question in enumerate(sample.questions):
        room = question.room if max_new_tokens is None else max_new_tokens
        if mode == "turns":
            answers.append(reader.ask(question, room, sample.between if i else ()))
        else:
            one = reader.copy() if len(sample.questions) > 1 else reader
            answers.append(one.ask(question, room))
    return answers


def score(questions: Sequence[Question], outputs: Sequence[str]) -> list[float]:
    """Each question's metric for the text of its answer."""
    return [question.score(output) for question, output in zip(questions, outputs, strict=True)]


class Reader:
    """A model, the cache of what it has read so far, and the last token it said, which the cache may lack."""

    def __init__(self, model: nn.Module, stop: Sequence[int] = ()):
        self.model, self.stop = model, {*stop, *end_tokens(model)}
        self.cache: Any = None
        self.unread: list[int] = []

    def copy(self) -> Reader:
        """Another reader with a cache of its own."""
        other = copy.copy(self)
        other.cache, other.unread = copy.deepcopy(self.cache), list(self.unread)
        return other

    def read(self, ids: Sequence[int] | np.ndarray) -> int:
        """Read token ids, and return the greedy choice for the next one."""
        tokens = torch.as_tensor(np.asarray(ids, dtype=np.int64), device=input_device(self.model))[None]
        out = self.model(tokens, **{CACHE: self.cache}, use_cache=True, logits_to_keep=1)
        self.cache = cache_of(out)
        return _greedy(out.logits)

    def ask(self, question: Question, room: int, between: Sequence[int] = ()) -> list[int]:
        """The answer's token ids, at most ``room``."""
        tell_prompt(self.cache, ended=False)
        said = [self.read([*self.unread, *between, *question.prompt.tolist()])]
        tell_prompt(self.cache, ended=True)
        while said[-1] not in self.stop and len(said) < room:
            said.append(self.read(said[-1:]))
        ended = said[-1] in self.stop
        self.unread = [] if ended else said[-1:]
        return said[:-1] if ended else said


def _greedy(logits: Tensor) -> int:
    return int(logits[0, -1].argmax())


def end_tokens(model: nn.Module) -> set[int]:
    """The token ids at which the model's generation ends."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set() if given is None else {given} if isinstance(given, int) else {*given}
