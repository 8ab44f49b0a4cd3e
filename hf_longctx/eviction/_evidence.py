"""What an eviction knows of a prompt's queries while it is read: the newest ones, and what a score gathered of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout.rotation import Rotation
from ..layout.scores import Scores
from ..layout.segments import fitting
from .base import JUDGED, Score, Seen

FAR = 1 << 20  # tokens: of a prompt so long that no score leaves its last query out
Tokens = tuple[Tensor, Tensor]  # k, v [B, n, S, D] of the cached tokens


@dataclass(eq=False)
class Evidence:
    """Of some KV heads of sequences of one length.

        row position   0 . . . . . . . gathered . . . . . . processed
                       |  in `state`   |     in `q`, not yet in `state`
                                   | q                      |

    A query is gathered when it is older than what may be taken back, so that a rollback only cuts ``q``. Tensors are
    replaced, never written to.

    Attributes:
        start: slot of the first token of its sequences.
        q: the newest queries ``[B, H, W, D]``; the last is that of the token ``processed`` - 1. None: none yet.
        processed: tokens up to the newest query.
        gathered: tokens whose queries are in ``state``.
    """

    rule: Score
    layer: int = 0
    rotation: Rotation | None = None
    start: int = 0
    q: Tensor | None = None
    processed: int = 0
    gathered: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def first(self) -> int:
        """Row position of the first query of ``q``."""
        return self.processed - (0 if self.q is None else self.q.shape[2])

    def saw(self, q: Tensor, processed: int, tokens: Callable[[], Tokens], scores: Scores, slack: int) -> None:
        """Queries ``[B, H, T, D]`` of the newest of ``processed`` tokens.

        Args:
            tokens: gives the cached tokens; the last is as new as the last query.
            slack: newest tokens that may be taken back.
        """
        if self.q is not None and self.processed == processed - q.shape[2]:
            q = torch.cat([self.q, q], 2)
        else:  # what came between was not shown: it was decoded
            self.gathered = processed - q.shape[2]
        self.q, self.processed = q, processed
        if self.rule.gathers and (due := processed - slack) > self.gathered:
            self.state = self._gather(due, tokens(), scores)
            self.gathered = due
        waiting = self.processed - self.gathered if self.rule.gathers else 0
        held = min(q.shape[2], max(waiting, self.rule.queries + slack))
        self.q = fitting(q[:, :, q.shape[2] - held :], spare=0)  # a view would keep all of them alive

    def score(
        self, tokens: Tokens, scores: Scores, processed: int, losses: Tensor | None = None, since: int | None = None
    ) -> Tensor:
        """Scores ``[B, n, S]`` of the cached tokens; what was not gathered yet is.

        Args:
            processed: tokens read.
            losses: surprisal of all of them, float32 ``[B, processed]``, where the score asks.
            since: how many of them came after the last eviction; None: there was none.
        """
        if self.rule.gathers and self.q is not None:
            left = tokens[0].shape[2] - (processed - self.processed)
            self.state = self._gather(self.processed, tuple(x[:, :, :left] for x in tokens), scores)
            self.gathered = self.processed
        q = None
        if self.rule.queries and self.q is not None:
            q = self.q[:, :, -self.rule.queries :]
        seen = self._seen(*tokens, q, processed, scores, self.state)
        if self.rule.surprises:
            known = self.state.get("surprisal")
            new = tokens[0].shape[2] - known.shape[2] if known is not None else processed if since is None else since
            seen = replace(seen, surprisal=losses[:, processed - new : processed])
        made = self.rule.score(seen)
        if self.rule.by_token and not self.rule.gathers:
            self.processed = self.gathered = processed
        if made.shape != tokens[0].shape[:3] or made.isnan().any():
            raise ValueError(
                f"{type(self.rule).__name__} gave scores {list(made.shape)} with {int(made.isnan().sum())} NaN for "
                f"keys {list(tokens[0].shape)}"
            )
        return made

    def _gather(self, end: int, tokens: Tokens, scores: Scores) -> dict[str, Tensor]:
        """``state`` with the queries of the tokens ``gathered .. end``; ``tokens`` are those up to ``processed``."""
        q = self.q[:, :, self.gathered - self.first : end - self.first]
        if not q.shape[2]:
            return self.state
        k, v = (x[:, :, : x.shape[2] - (self.processed - end)] for x in tokens)
        seen = self._seen(k, v, q, end, scores, dict(self.state))
        self.rule.gather(seen)
        return seen.state

    def _seen(self, k, v, q: Tensor | None, processed: int, scores: Scores, state: dict[str, Tensor]) -> Seen:
        # Counted back from the newest: before an eviction no token is missing, and after one all queries are newer.
        positions = torch.arange(processed - k.shape[2], processed, device=k.device)
        return Seen(k, v, positions, q, processed, scores, self.rotation, self.layer, state)

    def expected(self, q: Tensor, k: Tensor, scores: Scores) -> dict[str, Tensor]:
        """A state of the names and shapes that it has once queries up to ``q`` were gathered; ``k``: cached so far."""
        if not self.rule.gathers:
            return {name: k.new_zeros(k.shape[:3]) for name in self.rule.by_token}
        seen = self._seen(k, k, q, self.processed, scores, {})
        self.rule.gather(seen)
        return seen.state

    def kept(self, index: Sequence[Sequence[Tensor]]) -> Evidence:
        """What is known once only these of the cached tokens are left, by sequence and KV head, as many in each.

        What was gathered of queries alone is forgotten: a later prompt is scored by its own.
        """
        state = self.of_tokens.state
        at = torch.stack([torch.stack(list(heads)) for heads in index]) if self._by_token else None
        for name in self._by_token:  # 0 for tokens that came since, as `_columns.grown` has it
            more = int(at.max()) + 1 - state[name].shape[2] if at.numel() else 0
            state[name] = pad(state[name], (0, max(0, more))).gather(2, at)
        return replace(self, q=None, state=state)

    @property
    def of_tokens(self) -> Evidence:
        """What is known of the cached tokens, once a prompt was scored."""
        return replace(self, q=None, state={name: x for name, x in self.state.items() if name in self._by_token})

    @property
    def _by_token(self) -> set[str]:
        """Names of the state that has a number per cached token."""
        return {JUDGED, *self.rule.by_token} & self.state.keys()

    def crop(self, tokens: int) -> None:
        """Forget what came after the first ``tokens`` tokens, no further back than `oldest_crop`."""
        if tokens < self.processed:
            left = tokens - self.first
            self.q = self.q[:, :, :left].clone() if self.q is not None and left > 0 else None
            self.processed = max(tokens, 0)
            if gone := max(0, self.gathered - self.processed):
                cut = {name: self.state[name][..., :-gone] for name in self._by_token}
                self.state, self.gathered = {**self.state, **cut}, self.processed

    @property
    def oldest_crop(self) -> int:
        """Fewest tokens that `crop` can go back to and still know all that the score needs."""
        if self.rule.gathers:
            return self.gathered if self.state else 0
        if self.q is None:
            return 0
        return self.first + self.rule.queries if self.first else 0

    def part(self, row: int | None = None, head: tuple[int, int] | None = None) -> Evidence:
        """Of one sequence, or of one KV head: (which, of how many)."""

        def cut(x: Tensor) -> Tensor:
            x = x if row is None else x[row : row + 1]
            return x if head is None else x.unflatten(1, (head[1], -1))[:, head[0]]

        return self.map(cut)

    def map(self, change: Callable[[Tensor], Tensor]) -> Evidence:
        """One with every tensor ``[B, ...]`` changed."""
        state = {name: change(x) for name, x in self.state.items()}
        return replace(self, q=None if self.q is None else change(self.q), state=state)

    @classmethod
    def together(cls, parts: Sequence[Evidence]) -> Evidence:
        """That of sequences of one length, of what is known of each."""
        state = {name: torch.cat([part.state[name] for part in parts]) for name in parts[0].state}
        q = None if parts[0].q is None else torch.cat([part.q for part in parts])
        return replace(parts[0], q=q, state=state)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor it keeps alive."""
        yield from self.state.values()
        if self.q is not None:
            yield self.q


def of_heads(scores: Scores, heads: Sequence[int], total: int) -> Scores:
    """The scores of the query heads of these of ``total`` KV heads."""

    def own(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.unflatten(0, (total, -1))[list(heads)].flatten()

    return Scores(scores.scale, scores.softcap, own(scores.sinks), own(scores.first_bias))


def state_nbytes(rule: Score, tokens: int, head_dim: int, group: int, itemsize: int) -> int:
    """Bytes of what a score gathered for one KV head of a sequence's first ``tokens`` cached tokens."""
    if not rule.gathers or tokens <= 0:
        return 0
    try:
        fixed, per_token = _state_form(rule, head_dim, group, itemsize)
    except TypeError:  # a rule with a mapping among its fields has no hash
        fixed, per_token = _state_form.__wrapped__(rule, head_dim, group, itemsize)
    return fixed + per_token * tokens


def left_nbytes(rule: Score, tokens: int, head_dim: int, group: int, itemsize: int) -> int:
    """Bytes of what is known of the ``tokens`` tokens that are left to one KV head."""
    if rule.gathers:
        gathered = (state_nbytes(rule, count, head_dim, group, itemsize) for count in (tokens + 1, 1))
        return next(gathered) - next(gathered)  # not what was gathered of queries alone
    return len(rule.by_token) * tokens * max(itemsize, torch.float32.itemsize)  # what was said of them


@lru_cache
def _state_form(rule: Score, head_dim: int, group: int, itemsize: int) -> tuple[int, int]:
    """(bytes at any length, bytes per cached token), as one query leaves them."""
    dtype = torch.float64 if itemsize == 8 else torch.float32
    k = torch.zeros(1, 1, 1, head_dim, dtype=dtype)
    rotation = Rotation((1.0,) * (head_dim // 2))
    q = k.expand(1, group, 1, head_dim)
    seen = Seen(k, k, torch.tensor([FAR - 1]), q, FAR, Scores(1.0), rotation)
    rule.gather(seen)
    by_token = {name: name in rule.by_token for name in seen.state}
    sizes = {name: x.numel() * x.element_size() for name, x in seen.state.items()}
    return tuple(sum(size for name, size in sizes.items() if by_token[name] == kind) for kind in (False, True))
