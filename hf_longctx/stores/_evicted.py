"""The store of heads of which tokens are evicted by score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config.words import spec_word
from ..errors import CacheError
from ..eviction._evidence import Evidence, of_heads
from ..layout.heads import RoleHeads
from ..layout.ragged import Ragged
from ..layout.rotation import Rotation
from ..layout.rows import Rows
from ..layout.scores import Scores
from ..layout.segments import HeadKV, Place, Segment, joined
from ..layout.streamed import Streamed
from ._saved import SavedStore
from .base import Store, StoreSpec
from .full import Full

if TYPE_CHECKING:
    from .evicted import Evicted

ALL = -1  # stands for all sequences of a batch, or all KV heads
Key = tuple[int, int]  # of what is known: a sequence and a KV head, or `ALL`


@dataclass(frozen=True)
class Cut:
    """The geometry of what an eviction left.

        padded position      0 . . . . . . . . slots | new tokens          before
        in the inner store              0 . . . held | new tokens          after: ``slots - held`` fewer

    Attributes:
        slots: seen when it happened.
        held: of them in the inner store.
        starts: first real slot of each sequence in the inner store.
    """

    slots: int
    held: int
    starts: tuple[int, ...]

    @property
    def gone(self) -> int:
        return self.slots - self.held

    def of(self, rows: Rows) -> Rows:
        """The rows as the inner store has them."""

        def make() -> Rows:
            past = max(0, rows.past - self.gone)
            ends = None if rows.ends is None else tuple(end - self.gone for end in rows.ends)
            starts = self.starts if any(self.starts) else None
            return Rows(rows.batch, past, rows.total - self.gone - past, starts, ends)

        return rows.memo(("cut", self), make)


@dataclass
class Left(HeadKV):
    """What is cached of heads of which tokens were evicted.

    Attributes:
        inner: what the inner store has.
        ragged: what is left of earlier tokens, where heads keep different numbers.
        cut: None before the first eviction.
        evicted: tokens of each sequence that are not cached any more; of ragged heads 0, they differ.
    """

    inner: HeadKV | None = None
    ragged: Ragged | None = None
    cut: Cut | None = None
    evicted: tuple[int, ...] = ()

    @property
    def uneven(self) -> bool:
        return self.ragged is not None

    def gone(self, row: int) -> int:
        return self.evicted[row] if self.evicted else 0

    def without_last(self, count: int) -> Left:
        if not count:
            return self
        inner = self.inner.without_last(count)
        past = [] if self.ragged is None else [self.ragged]
        return replace(self, inner=inner, segments=[*past, *inner.segments])

    def alone(self, rows: slice, start: int) -> list[Segment | Streamed]:
        own = self.inner.alone(rows, start if self.cut is None else self.cut.starts[rows.start or 0])
        return own if self.ragged is None else [self.ragged.alone(rows), *own]

    def tokens(self, group: slice, start: int, head: int) -> tuple[Tensor, Tensor]:
        """k, v ``[b, n', S, D]`` of sequences that begin at one slot: of `ALL` heads, where they are even, or one."""
        segments = self.alone(group, start)
        if head == ALL:
            return joined(segments)
        ragged, *plain = segments
        own = ragged.head(0, head)
        pairs = [(own.k, own.v), *((one.k[:, head : head + 1], one.v[:, head : head + 1]) for one in plain)]
        return tuple(torch.cat(pair, 2) for pair in zip(*pairs, strict=True))


class EvictedStore(Store):
    """All tokens in a full store while a prompt is read; then what is left, and the tokens that come.

        uniform, layer       inner store: | kept of the prompt | new tokens |

        head, model          Ragged:  head 0 | kept          |       inner store: | new tokens |
                                      head 1 | kept  |                            | new tokens |

    Attributes:
        inner: store of the tokens since the last eviction, and of what is left of earlier ones where heads keep equally
            many.
        ragged: what is left of earlier tokens where they do not.
        cut: geometry of the last eviction; None before the first.
        evidence: what is known of queries, by sequence and KV head.
        rotation, layer: of the layer, for the score.
        watcher: shown the queries of every forward in place of the store, as `attended`; None: nobody.
    """

    rotation: Rotation | None = None
    layer: int = 0
    watcher: Callable[..., None] | None = None

    def __init__(self, spec: Evicted, heads: RoleHeads, max_tokens: int | None):
        super().__init__(spec, heads, max_tokens)
        n = len(heads.kv_heads)
        self.own = RoleHeads(heads.role, tuple(range(n)), n)
        self._begin()

    def _begin(self) -> None:
        self.inner: Store = Full().new(self.own, self.max_tokens)
        self.ragged: Ragged | None = None
        self.cut: Cut | None = None
        self.evidence: dict[Key, Evidence] = {}
        self.scores: Scores | None = None
        self.evicted: tuple[int, ...] = ()

    @property
    def slack(self) -> int:
        return self.inner.slack

    @slack.setter
    def slack(self, tokens: int) -> None:
        self.inner.slack = tokens

    @property
    def asks(self) -> bool:
        """Whether the score looks at queries."""
        return bool(self.spec.rule.queries or self.spec.rule.gathers)

    def geometry(self, rows: Rows) -> Rows:
        return rows if self.cut is None else self.cut.of(rows)

    def prepare(self, k: Tensor, v: Tensor, rows: Rows) -> None:
        self.inner.prepare(self.heads.take(k), self.heads.take(v), self.geometry(rows))

    def append(self, k: Tensor, v: Tensor, rows: Rows) -> Left:
        part = self.inner.append(self.heads.take(k), self.heads.take(v), self.geometry(rows))
        return self._shown(part, self.watcher or (self.attended if self.asks else None))

    def held(self, rows: Rows) -> Left:
        return self._shown(self.inner.held(self.geometry(rows)))

    def _shown(self, part: HeadKV, attended: Callable[..., None] | None = None) -> Left:
        past = [] if self.ragged is None else [self.ragged]
        more = {"inner": part, "ragged": self.ragged, "cut": self.cut, "evicted": self.evicted, "attended": attended}
        return Left(self.heads, [*past, *part.segments], self.spec, state=part.state, **more)

    def place(self, rows: Rows) -> Place | None:
        if self.watcher is not None or (self.asks and self.spec.every is not None):
            return None  # its queries are asked for
        place = self.inner.place(self.geometry(rows)) if self.inner.has_place() else None
        return place if place is None or self.ragged is None else place._replace(before=self.ragged)

    def shown(self, segments: list[Segment], before: Ragged | None = None) -> Left:
        return self._shown(self.inner.shown(segments))

    def attended(self, q: Tensor, part: Left, rows: Rows, scores: Scores) -> None:
        if rows.ends is not None:
            return  # right pads: such a cache cannot be continued
        self.scores = scores
        n = len(self.heads.kv_heads)
        for group, start in rows.groups():
            new, processed = rows.real(group.start or 0)
            if not new:
                continue
            for head in (ALL,) if self.ragged is None else range(n):
                own = q[group, :, rows.new - new :]
                own = own if head == ALL else own.unflatten(1, (n, -1))[:, head]
                heads = range(n) if head == ALL else (head,)
                known = self.known(group, head, rows.batch)
                tokens = partial(part.tokens, group, start, head)
                known.saw(own, processed, tokens, of_heads(scores, heads, n), self.slack)

    def known(self, group: slice, head: int, batch: int) -> Evidence:
        """What is known of these sequences and heads; what was known of all is parted where it is asked of one."""
        row = ALL if group == slice(None) else group.start
        if row != ALL and (ALL, head) in self.evidence:
            whole = self.evidence.pop((ALL, head))
            self.evidence |= {(one, head): whole.part(one) for one in range(batch)}
        if row == ALL and (0, head) in self.evidence:
            parts = [self.evidence.pop((one, head)) for one in range(batch)]
            self.evidence[ALL, head] = Evidence.together(parts)
        if (row, head) not in self.evidence:
            self.evidence[row, head] = Evidence(self.spec.rule, self.layer, self.rotation)
        return self.evidence[row, head]

    def scored(self, rows: Rows, losses: Tensor | None = None) -> list[list[Tensor]]:
        """Scores ``[S]`` of each sequence's KV heads, +inf for what must stay; ``rows`` are all that was seen.

        Args:
            losses: surprisal of every padded position, float32 ``[B, total]``, where the score asks.

        Raises:
            CacheError: the score asks for queries, and none were seen.
        """
        part = self.held(rows)
        found: list[list[Tensor]] = [[] for _ in range(rows.batch)]
        for group, start in rows.groups():
            _, processed = rows.real(group.start or 0)
            for head in self.known_apart:
                own = None if losses is None else losses[group, start:]
                made = self._score(group, head, part.tokens(group, start, head), processed, rows, own)
                made[..., : self.spec.sink] = float("inf")
                made[..., max(0, made.shape[2] - self.spec.recent) :] = float("inf")
                for own, heads in zip(found[group], made, strict=True):
                    own += heads.unbind(0)
        return found

    def _score(
        self,
        group: slice,
        head: int,
        tokens: tuple[Tensor, Tensor],
        processed: int,
        rows: Rows,
        losses: Tensor | None,
    ) -> Tensor:
        k = tokens[0]
        known = self.known(group, head, rows.batch)
        if not k.shape[2]:
            return k.new_zeros(k.shape[:3], dtype=torch.float32)
        if self.asks and known.q is None and not known.state:
            raise CacheError(
                f"score {spec_word(self.spec.rule)!r} of the {self.heads.role} heads asks for queries of the prompt, "
                "and this cache has seen none: it was filled by hand. Read the prompt with the model, or use a score "
                "of keys alone, such as key_norm."
            )
        n = len(self.heads.kv_heads)
        heads = range(n) if head == ALL else (head,)
        scores = of_heads(self.scores or Scores(k.shape[3] ** -0.5), heads, n)
        since = None if self.cut is None else min(processed, rows.total - self.cut.slots)
        return known.score(tokens, scores, processed, losses, since).clone()

    @property
    def known_apart(self) -> Sequence[int]:
        """The heads that are known apart."""
        return (ALL,) if self.ragged is None else range(len(self.heads.kv_heads))

    def due(self, seen: int) -> bool:
        """Whether so many tokens came since the last eviction that one is due."""
        every = self.spec.every
        return every is not None and seen - (self.cut.slots if self.cut else 0) >= every

    def evict(self, rows: Rows, keep: list[list[Tensor]]) -> None:
        """Leave of each sequence's KV heads the tokens of the masks ``keep``, bool ``[S]``."""
        if spec_word(self.spec.keep) == "full" and all(one.all() for heads in keep for one in heads):
            self.evidence = {key: replace(one, q=None) for key, one in self.evidence.items()}
            return
        slack = self.slack
        known = self._known_after(rows, keep)
        part = self.held(rows)
        if self.spec.ragged:
            self._leave_ragged(rows, part, keep)
        else:
            self._leave_even(rows, part, keep)
        self.evidence = known
        self.slack = slack

    def _leave_ragged(self, rows: Rows, part: Left, keep: list[list[Tensor]]) -> None:
        parts = []
        for row, masks in enumerate(keep):
            one, (_, processed) = slice(row, row + 1), rows.real(row)
            if self.ragged is None:
                k, v = part.tokens(one, rows.start(row), ALL)
                tokens = [(k[:, [head]], v[:, [head]]) for head in range(len(masks))]
            else:
                tokens = [part.tokens(one, rows.start(row), head) for head in range(len(masks))]
            parts.append([self._left(row, head, masks[head], *tokens[head], processed) for head in range(len(masks))])
        self.ragged = Ragged.of(parts)
        self._go_on(Full(), rows, 0, (0,) * rows.batch)

    def _left(self, row: int, head: int, keep: Tensor, k: Tensor, v: Tensor, processed: int) -> tuple[Tensor, ...]:
        """What is left of one KV head: k, v, positions, and the bias where there may be one."""
        k, v = k[0, 0], v[0, 0]
        before = None if self.ragged is None else self.ragged.of_head(row, head)
        new = len(k) if before is None else len(k) - (before.stop - before.start)
        positions = torch.arange(processed - new, processed, device=k.device, dtype=torch.int32)
        bias = torch.zeros(len(k), device=k.device)
        if before is not None:
            positions = torch.cat([self.ragged.positions[before], positions])
            if self.ragged.score_bias is not None:
                bias[: len(k) - new] = self.ragged.score_bias[before]
        biased = self.spec.after.biased
        left = self.spec.after.apply(k, v, bias if biased else None, keep)
        one = (left.k, left.v, positions[keep])
        return (*one, left.bias) if biased else one

    def _leave_even(self, rows: Rows, part: Left, keep: list[list[Tensor]]) -> None:
        counts = [int(heads[0].sum()) for heads in keep]
        most = max(counts)
        pair = None
        for row, masks in enumerate(keep):
            own = part.tokens(slice(row, row + 1), rows.start(row), ALL)
            if pair is None:
                pair = [x.new_zeros(rows.batch, x.shape[1], most, x.shape[3]) for x in own]
            for into, x in zip(pair, own, strict=True):
                for head, mask in enumerate(masks):
                    into[row, head, most - counts[row] :] = x[0, head, mask]
        before = self.evicted or (0,) * rows.batch
        self.evicted = tuple(
            gone + len(heads[0]) - count for gone, heads, count in zip(before, keep, counts, strict=True)
        )
        starts = tuple(most - count for count in counts)
        self._go_on(self.spec.keep, rows, most, starts)
        self.inner.append(*pair, Rows(rows.batch, 0, most, starts if any(starts) else None))

    def _go_on(self, spec: StoreSpec, rows: Rows, held: int, starts: tuple[int, ...]) -> None:
        """An inner store for what comes now."""
        starts = tuple(
            max(0, rows.start(row) - rows.total) + held if rows.start(row) >= rows.total else start
            for row, start in enumerate(starts)
        )
        self.cut = Cut(rows.total, held, starts)
        room = None if self.max_tokens is None else max(1, self.max_tokens - self.cut.gone)
        self.inner = spec.new(self.own, room)

    def _known_after(self, rows: Rows, keep: list[list[Tensor]]) -> dict[Key, Evidence]:
        """What is still known once these are left: what was gathered of all queries."""
        if not (self.spec.rule.gathers or self.spec.rule.by_token):
            return {}
        known: dict[Key, Evidence] = {}
        for (row, head), one in self.evidence.items():
            if not self.spec.ragged:
                masks = keep if row == ALL else [keep[row]]
                known[row, head] = one.kept([[mask.nonzero()[:, 0] for mask in heads] for heads in masks])
                continue
            for own in range(rows.batch) if row == ALL else (row,):
                for kv in range(len(self.heads.kv_heads)) if head == ALL else (head,):
                    only = (kv, len(self.heads.kv_heads)) if head == ALL else None
                    part = one.part(own if row == ALL else None, only)
                    known[own, kv] = part.kept([[keep[own][kv].nonzero()[:, 0]]])
        return known

    def crop(self, rows: Rows, target: int) -> None:
        self.inner.crop(self.geometry(rows), target - (self.cut.gone if self.cut else 0))
        for (row, _), one in self.evidence.items():
            one.crop(target - rows.start(max(0, row)))

    def oldest_crop(self, total: int) -> int:
        gone, slots = (self.cut.gone, self.cut.slots) if self.cut else (0, 0)
        known = max((one.oldest_crop for one in self.evidence.values()), default=0)
        behind = total - max((one.processed for one in self.evidence.values()), default=0)
        return max(slots, self.inner.oldest_crop(total - gone) + gone, known + behind if known else 0)

    def reset(self) -> None:
        super().reset()
        slack = self.slack
        self._begin()
        self.slack = slack

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.inner.map_rows(change)
        with torch.inference_mode(False):  # as in new_segment
            if self.ragged is not None:
                self.ragged = self.ragged.copy()
                self.ragged.map_rows(change)
            batch = len(self.cut.starts) if self.cut else 1 + max((row for row, _ in self.evidence), default=0)
            order = change(torch.arange(batch)).tolist() if self._apart(batch) else []
            apart = {key: one for key, one in self.evidence.items() if key[0] != ALL}
            self.evidence = {key: one.map(change) for key, one in self.evidence.items() if key[0] == ALL}
            for new, old in enumerate(order):
                self.evidence |= {(new, head): one.part() for (row, head), one in apart.items() if row == old}
        if self.cut is not None:
            self.cut = replace(self.cut, starts=tuple(self.cut.starts[row] for row in order))
            self.evicted = tuple(self.evicted[row] for row in order) if self.evicted else ()

    def _apart(self, batch: int) -> bool:
        return self.cut is not None or any(row != ALL for row, _ in self.evidence)

    def fork(self) -> EvictedStore:
        other = super().fork()
        other.inner = self.inner.fork()
        other.ragged = None if self.ragged is None else self.ragged.copy()
        other.evidence = {key: one.part() for key, one in self.evidence.items()}
        return other

    def tensors(self) -> Iterator[Tensor]:
        yield from self.inner.tensors()
        if self.ragged is not None:
            yield from self.ragged.tensors()
        for one in self.evidence.values():
            yield from one.tensors()

    def offloaded(self) -> dict[str, int]:
        return self.inner.offloaded()

    def check(self, saved: SavedStore) -> None:
        raise NotImplementedError
