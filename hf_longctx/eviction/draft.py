"""``score: draft``: what the last queries of the prompt attend to, and those of a draft of its answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..config.bounds import TOKENS
from ..errors import ConfigError
from ._columns import weights_in_pieces
from .base import Asked, Context, Reading, Seen
from .snapkv import check_pool, smoothed


@dataclass(frozen=True)
class Draft(Asked):
    """Keep the tokens to which the answer will attend, as a small model drafts it, and their neighbours (SpecKV).

    The model reads the draft after the prompt, on a copy of the cache. The last ``window`` queries of the prompt and
    all of the draft vote by their attention weights; a token's score is the largest of them over the query heads of the
    KV head, and then the largest in its neighbourhood, as in the authors' code. `hf_longctx.prompts.draft.draft_scores`
    does all of it. With ``votes: mean`` and no draft it is ``snapkv`` with ``pooling: max``.

    The draft is only read, and no token of the answer is taken from it: an ``assistant_model`` of generate() is another
    thing, and does not call this. What the authors do to read the prompt itself faster is a prefill pattern here.

    Attributes:
        window: last queries of the prompt, whose own keys are scored as nothing: `recent` keeps them.
        pool: tokens of a neighbourhood, odd.
        votes: ``max`` or ``mean`` over the queries, and over the query heads of a KV head.
    """

    paper: ClassVar[str] = "arXiv:2506.08373"
    cases: ClassVar = ({"window": 8}, {"window": 8, "pool": 1, "votes": "mean"})

    window: int = field(default=32, metadata={**TOKENS, "max": 4096})
    pool: int = field(default=7, metadata={**TOKENS, "max": 1025})
    votes: str = field(default="max", metadata={"choices": ("max", "mean")})

    def __post_init__(self) -> None:
        check_pool(self.pool)

    @property
    def queries(self) -> int:
        return self.window

    def readings(self, context: Context) -> Iterator[Reading]:
        if context.follows is None or not len(context.follows):
            raise ConfigError(
                "follows: got no tokens, and score 'draft' looks at what comes after the text. Give the ids of a "
                "draft of the answer, or call hf_longctx.prompts.draft.draft_scores, which makes one."
            )
        yield Reading(context.follows, 0, len(context.ids), context.sink)

    def judge(self, seen: Seen, reading: Reading) -> Tensor:
        text = seen.k.shape[2] - len(reading.ids)
        before = text - min(text, seen.q.shape[2] - len(reading.ids))
        votes = torch.zeros((), device=seen.k.device)
        for _, made in weights_in_pieces(seen):
            made = made[..., :before]
            votes = torch.maximum(votes, made.amax(2)) if self.votes == "max" else votes + made.sum(2)
        if self.votes == "mean":
            votes = votes / seen.q.shape[2]
        by_head = smoothed(votes, self.pool, "max").unflatten(1, (seen.k.shape[1], -1))
        return pad(by_head.amax(2) if self.votes == "max" else by_head.mean(2), (0, text - before))
