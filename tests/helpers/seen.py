"""Random prompts as an eviction score is shown them, and the obvious attention weights of their queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from helpers.cases import cases
from hf_longctx.config.words import load
from hf_longctx.eviction.base import Score, Seen
from hf_longctx.layout.rotation import Rotation
from hf_longctx.layout.scores import Scores

DIM = 8
ROTATION = Rotation(tuple(0.3 ** (2 * i / 6) for i in range(3)))  # six of the eight channels turn
CASES = {name: fields for name, (_, fields) in cases("eviction").items()}
WORDS = {name: word for name, (word, _) in cases("eviction").items()}


def rule_of(case: str) -> Score:
    return load("eviction", WORDS[case])(**CASES[case])


@dataclass
class Prompt:
    """Queries, keys and values of all tokens of some sequences of one length."""

    q: Tensor  # [B, H, T, D]
    k: Tensor  # [B, n, T, D]
    v: Tensor
    scores: Scores = field(default_factory=lambda: Scores(DIM**-0.5))
    layer: int = 1
    rotation: Rotation = ROTATION

    @classmethod
    def random(cls, tokens=40, batch=2, heads=2, group=3, dtype=torch.float64, **more) -> Prompt:
        shapes = [(batch, count, tokens, DIM) for count in (heads * group, heads, heads)]
        return cls(*(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes), **more)

    @property
    def tokens(self) -> int:
        return self.k.shape[2]

    @property
    def surprisal(self) -> Tensor:
        """Some number of each token, float32 ``[B, T]``."""
        return self.v[:, 0, :, 0].float().abs()

    def alone(self, row: int) -> Prompt:
        own = (x[row : row + 1] for x in (self.q, self.k, self.v))
        return Prompt(*own, self.scores, self.layer, self.rotation)

    def seen(self, low: int, high: int, rule: Score, state: dict, kept: Sequence[int] | None = None) -> Seen:
        """What the tokens low .. high are shown as; ``kept``: which of those before them were not evicted."""
        at = torch.tensor([*(range(low) if kept is None else kept), *range(low, high)])
        k, v = (x[:, :, at] for x in (self.k, self.v))
        rotation = self.rotation if rule.rotates else None
        return Seen(k, v, at.to(k.device), self.q[:, :, low:high], high, self.scores, rotation, self.layer, state)

    def gathered(self, rule: Score, cuts: Sequence[int] = (), low: int = 0, state=None, kept=None) -> Seen:
        """The whole prompt, read in pieces; its first ``low`` tokens were of an earlier prompt."""
        state = {} if state is None else state
        ends = [low, *cuts, self.tokens]
        kept = list(range(low)) if kept is None else list(kept)
        for start, end in zip(ends, ends[1:], strict=False):
            if rule.gathers:
                rule.gather(self.seen(start, end, rule, state, kept))
            kept += range(start, end)
        seen = self.seen(self.tokens, self.tokens, rule, state, kept)
        queries = self.q[:, :, max(low, self.tokens - rule.queries) :] if rule.queries else None
        return replace(seen, q=queries, surprisal=self.surprisal[:, low:] if rule.surprises else None)

    def score(self, rule: Score, cuts: Sequence[int] = ()) -> Tensor:
        return rule.score(self.gathered(rule, cuts))

    def after_eviction(self, rule: Score, kept: Sequence[int], low: int) -> Seen:
        """Of the first ``low`` tokens, a prompt, these were kept; the others are a second prompt."""
        first = Prompt(*(x[:, :, :low] for x in (self.q, self.k, self.v)), self.scores, self.layer, self.rotation)
        seen = first.gathered(rule)
        if rule.surprises:
            rule.score(seen)
        state = seen.state
        state.update({name: state[name][:, :, list(kept)] for name in rule.by_token if name in state})
        return self.gathered(rule, (), low, state, kept)

    def weights(self, change=lambda x: x) -> Tensor:
        """Attention weights ``[B, H, T, T]``, written out; ``change``: of the scores."""
        group = self.q.shape[1] // self.k.shape[1]
        k = self.k.double().repeat_interleave(group, 1)
        made = change(self.q.double() @ k.transpose(2, 3) * self.scores.scale)
        later = torch.ones(self.tokens, self.tokens, dtype=torch.bool).triu(1)
        return made.masked_fill(later, float("-inf")).softmax(-1)

    def grouped(self, by_head: Tensor) -> Tensor:
        """``[B, H, S]`` as the mean over each KV head's query heads."""
        group = self.q.shape[1] // self.k.shape[1]
        return torch.stack([by_head[:, h : h + group].mean(1) for h in range(0, by_head.shape[1], group)], 1)
