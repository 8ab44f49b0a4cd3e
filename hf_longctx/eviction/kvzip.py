"""``score: kvzip``: what the model looks at while it writes the text out again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import CacheError, ConfigError
from ._repetition import largest, repetitions
from .base import Asked, Context, Reading, Seen

WHOLE = "\n\nRepeat the previous context exactly."
PART = "\n\nRepeat the part of the previous context exactly, starting with "


@dataclass(frozen=True)
class Kvzip(Asked):
    """Keep the tokens to which the model attends while it repeats the text; once per text, for any question.

    Every chunk of the text is read again after an instruction to repeat it, on a copy of the cache. A token's score is
    the largest weight that a query of the reading gives it, over all query heads of the KV head, in a softmax over the
    store's `sink` tokens, the chunk and the reading itself, as in the authors' code; in float32. It takes about as long
    as reading the text twice more. The authors share one budget over the whole model: ``by: model``.

    Between the instruction and the chunk stands what the tokenizer's chat template puts between a question and its
    answer, or a line break. The authors never evict their system prompt; ``sink`` may hold one.

    Attributes:
        chunk: tokens repeated at once.
        words: give the instruction, for which the tokenizer is needed; false: the text alone, for token ids of no
            language.
    """

    paper: ClassVar[str] = "arXiv:2505.23416"
    agnostic: ClassVar[bool] = True
    cases: ClassVar = ({"chunk": 16, "words": False},)

    chunk: int = field(default=2000, metadata={"min": 16, "max": 2**20, "unit": "tokens"})
    words: bool = True

    @property
    def needs_tokenizer(self) -> bool:
        return self.words

    def readings(self, context: Context) -> Iterator[Reading]:
        if self.words and context.tokenizer is None:
            raise ConfigError(
                "tokenizer: got none, and score 'kvzip' asks the model in words to repeat the text. Give the model's "
                "tokenizer, or set words: false in the score."
            )
        if context.gone:
            raise CacheError(
                "score 'kvzip' repeats the whole text, and tokens of this cache left before by another score. Compress "
                "a cache that still has all of them."
            )
        instruct = partial(instruction, context.tokenizer) if self.words else lambda before: before
        return repetitions(context.ids, context.first, len(context.ids), self.chunk, context.sink, instruct)

    def judge(self, seen: Seen, reading: Reading) -> Tensor:
        return largest(seen, reading).unflatten(1, (seen.k.shape[1], -1)).amax(2)


def instruction(tokenizer: Any, before: Tensor) -> Tensor:
    """Ids that ask for the text again, or for what follows its tokens ``before``, and begin an answer."""
    words = _ids(tokenizer, PART if len(before) else WHOLE)
    return torch.cat([words, before, _ids(tokenizer, _turn(tokenizer))])


def _ids(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def _turn(tokenizer: Any) -> str:
    """What the chat template puts between a question and its answer; thinking is off where it asks."""
    if not getattr(tokenizer, "chat_template", None):
        return "\n"
    how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    return (
        tokenizer.apply_chat_template([{"role": "user", "content": WHOLE}], **how).partition(WHOLE.strip())[2] or "\n"
    )
