"""How a store is asked for another score than its own, and for one that has the model read something."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config.words import spec_word
from ..errors import CacheError
from ..eviction._evidence import of_heads
from ..eviction.base import JUDGED, Asked, Reading, Score, Seen
from ..layout.rows import Rows
from ..layout.scores import Scores
from ._evicted import EvictedStore
from ._known import Known
from ._left import ALL, Left

if TYPE_CHECKING:
    from .evicted import Evicted


@dataclass
class Judging:
    """In place of its store it is shown the queries of what a copy of a cache reads; one sequence.

    Attributes:
        store: of the copy.
        found: scores ``[1, n, S]`` of every reading, by the head that was known apart, or `ALL`.
    """

    store: EvictedStore
    rule: Asked
    reading: Reading
    found: dict[int, list[Tensor]] = field(default_factory=dict)

    def __call__(self, q: Tensor, part: Left, rows: Rows, scores: Scores) -> None:
        n = len(self.store.heads.kv_heads)
        (group, start), (_, processed) = next(rows.groups()), rows.real(0)
        text = processed - len(self.reading.ids)
        for head in self.store.known_apart:
            own = q if head == ALL else q.unflatten(1, (n, -1))[:, head]
            if self.rule.queries:
                own = torch.cat([self._before(group, start, head, text), own], 2)
            k, v = part.tokens(group, start, head)
            positions = torch.arange(processed - k.shape[2], processed, device=k.device)
            heads = range(n) if head == ALL else (head,)
            seen = Seen(k, v, positions, own, processed, of_heads(scores, heads, n), layer=self.store.known.layer)
            self.found.setdefault(head, []).append(self.rule.judge(seen, self.reading))

    def _before(self, group: slice, start: int, head: int, text: int) -> Tensor:
        """The last queries of the text, which has so many tokens."""
        known = self.store.known.of(group, start, head, 1)
        if known.q is None or known.processed != text:
            raise CacheError(
                f"score {spec_word(self.rule)!r} asks for the queries of the last tokens before the draft, and this "
                "cache has not seen them: it decoded since, or was filled by hand. Let the config name that score, "
                "and compress where a prompt ends."
            )
        return known.q[:, :, -self.rule.queries :]


def judged_of(store: EvictedStore, rows: Rows) -> int | None:
    """How many of the text's tokens came since they were judged last; None where they never were. One sequence."""
    head = store.known_apart[0]
    (group, start) = next(rows.groups())
    known = store.known.of(group, start, head, 1).state.get(JUDGED)
    return None if known is None else store.held(rows).tokens(group, start, head)[0].shape[2] - known.shape[2]


def take(store: EvictedStore, rows: Rows, found: dict[int, Sequence[Tensor]]) -> None:
    """Keep what readings judged, in place of what was known of those tokens; ``rows`` are all that was seen."""
    (group, start), (_, processed) = next(rows.groups()), rows.real(0)
    part = store.held(rows)
    for head in store.known_apart:
        k = part.tokens(group, start, head)[0]
        known = store.known.of(group, start, head, 1)
        new = torch.cat([k.new_zeros(k.shape[:2] + (0,), dtype=torch.float32), *found.get(head, ())], 2)
        before = k.shape[2] - new.shape[2]
        old = known.state.get(JUDGED)
        old = new.new_zeros(*k.shape[:2], before) if old is None else old[..., :before]
        known.state = {**known.state, JUDGED: torch.cat([old, new], 2)}
        known.processed = known.gathered = processed


@contextmanager
def scoring_by(store: EvictedStore, spec: Evicted) -> Iterator[None]:
    """Inside, the store scores and evicts as ``spec`` says; what is known for its own score is kept as far as it can.

    Raises:
        CacheError: the score asks for queries that were not kept.
    """
    own, before = store.spec, store.known
    _refuse_unseen(store, spec.rule)
    same = spec.rule == own.rule or (type(spec.rule) is type(own.rule) and not own.rule.gathers)

    def of(known: Known, rule: Score) -> Known:
        return known.for_rule(rule, whole=same)

    cut = store.cut
    store.spec = spec
    store.known = of(before, spec.rule)
    try:
        yield
    finally:
        store.spec = own
        evicted = store.cut is not cut
        store.known = of(store.known, own.rule) if evicted or same else before


def _refuse_unseen(store: EvictedStore, rule: Score) -> None:
    own = store.spec.rule
    word = spec_word(rule)
    if rule == own:
        return
    if rule.gathers or rule.rotates:
        raise CacheError(
            f"score {word!r} learns from every query of a prompt while that is read, and this cache was read for "
            f"{spec_word(own)!r}. Let the config name {word!r}: {{store: evicted, rule: {{score: {word}}}}}."
        )
    for one in store.known.parts.values() if rule.queries else ():
        if one.q is not None and one.q.shape[2] < rule.queries and one.first:
            raise CacheError(
                f"score {word!r} asks for the last {rule.queries} queries, and this cache has kept {one.q.shape[2]} "
                f"for {spec_word(own)!r}. Let the config name a score with such a window."
            )
