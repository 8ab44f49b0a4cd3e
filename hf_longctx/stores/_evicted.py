"""The store of heads of which tokens are evicted by score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..config.words import spec_word
from ..errors import CacheError
from ..eviction._evidence import Evidence
from ..layout.heads import RoleHeads
from ..layout.ragged import Ragged
from ..layout.rows import Rows
from ..layout.scores import Scores
from ..layout.segments import HeadKV, Place, Segment
from ._evicted_file import check, cut_of, told_of
from ._known import Known
from ._left import ALL, Cut, Left
from ._saved import SavedStore
from .base import Store
from .full import Full

if TYPE_CHECKING:
    from .evicted import Evicted

RAGGED = "ragged"  # its only segment


class EvictedStore(Store):
    """All tokens in a full store while a prompt is read; then what is left, and the tokens that come.

        uniform, layer       inner store: | kept of the prompt | new tokens |

        head, model          Ragged:  head 0 | kept          |       inner store: | new tokens |
                                      head 1 | kept  |                            | new tokens |

    Attributes:
        inner: store of the tokens since the last eviction, and of what is left of earlier ones where heads keep equally
            many.
        cut: geometry of the last eviction; None before the first.
        evicted: see `Left`.
        known: what is known of queries.
        batch: sequences; 0 before the first forward.
        judged: slots seen when its tokens were last scored, whether or not any left.
        watcher: shown the queries of every forward in place of the store, as `attended`; None: nobody.
    """

    watcher: Callable[..., None] | None = None

    kinds: ClassVar = (Ragged,)
    numbers: ClassVar[tuple[str, ...]] = ("batch", "judged")
    parts: ClassVar[tuple[str, ...]] = ("inner", "cut", "known")

    def __init__(self, spec: Evicted, heads: RoleHeads, max_tokens: int | None):
        super().__init__(spec, heads, max_tokens)
        n = len(heads.kv_heads)
        self.own = RoleHeads(heads.role, tuple(range(n)), n)
        self.known = Known(spec.rule, n)
        self._begin()

    def _begin(self) -> None:
        self.cut: Cut | None = None
        self.evicted: tuple[int, ...] = ()
        self.batch = self.judged = 0
        self.known.clear()
        self.inner: Store = self._new_inner()

    def _new_inner(self) -> Store:
        """An empty inner store for what comes after the last eviction."""
        spec = Full() if self.cut is None or self.spec.ragged else self.spec.keep
        gone = 0 if self.cut is None else self.cut.gone
        return spec.new(self.own, None if self.max_tokens is None else max(1, self.max_tokens - gone))

    @property
    def ragged(self) -> Ragged | None:
        """What is left of earlier tokens where heads do not keep equally many."""
        return self.segments.get(RAGGED)

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
        self.batch = rows.batch
        k, v = (self.heads.take(x) for x in (k, v))
        if self.ragged is not None:  # one dtype for both: autocast may have been switched since
            k, v = (x.to(self.ragged.dtype) for x in (k, v))
        part = self.inner.append(k, v, self.geometry(rows))
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
        self.known.saw(scores)
        n = len(self.heads.kv_heads)
        for group, start in self._groups(rows):
            new, processed = rows.real(group.start or 0)
            for head in self.known_apart if new else ():
                own = q[group, :, rows.new - new :]
                own = own if head == ALL else own.unflatten(1, (n, -1))[:, head]
                known = self.known.of(group, start, head, rows.batch)
                tokens = partial(part.tokens, group, start, head)
                known.saw(own, processed, tokens, self.known.scores_of(head, q.shape[3]), self.slack)

    def _groups(self, rows: Rows) -> Iterator[tuple[slice, int]]:
        """As `Rows.groups`, but one sequence at a time where each has other tokens."""
        if self.ragged is None:
            return rows.groups()
        return ((slice(row, row + 1), rows.start(row)) for row in range(rows.batch))

    @property
    def known_apart(self) -> Sequence[int]:
        """The heads that are known apart."""
        return (ALL,) if self.ragged is None else range(len(self.heads.kv_heads))

    def scored(self, rows: Rows, losses: Tensor | None = None) -> list[list[Tensor]]:
        """Scores ``[S]`` of each sequence's KV heads, +inf for what must stay; ``rows`` are all that was seen.

        Args:
            losses: surprisal of every padded position, float32 ``[B, total]``, where the score asks.

        Raises:
            CacheError: the score asks for queries, and none were seen.
        """
        part = self.held(rows)
        found: list[list[Tensor]] = [[] for _ in range(rows.batch)]
        for group, start in self._groups(rows):
            _, processed = rows.real(group.start or 0)
            for head in self.known_apart:
                known = self.known.of(group, start, head, rows.batch)
                lost = None if losses is None else losses[group, start:]
                since = None if self.cut is None else min(processed, rows.total - self.cut.slots)
                made = self._score(known, head, part.tokens(group, start, head), processed, lost, since)
                made[..., : self.spec.sink] = float("inf")
                made[..., max(0, made.shape[2] - self.spec.recent) :] = float("inf")
                for own, heads in zip(found[group], made, strict=True):
                    own += heads.unbind(0)
        return found

    def _score(
        self,
        known: Evidence,
        head: int,
        tokens: tuple[Tensor, Tensor],
        processed: int,
        losses: Tensor | None,
        since: int | None,
    ) -> Tensor:
        k = tokens[0]
        if not k.shape[2]:
            return k.new_zeros(k.shape[:3], dtype=torch.float32)
        if self.asks and known.q is None and (self.spec.rule.queries or not known.state):
            raise CacheError(
                f"score {spec_word(self.spec.rule)!r} of the {self.heads.role} heads asks for queries of the prompt, "
                "and this cache has none: it was filled by hand, or they went with an earlier eviction. Read the "
                "prompt with the model, or use a score of keys alone, such as key_norm."
            )
        return known.score(tokens, self.known.scores_of(head, k.shape[3]), processed, losses, since).clone()

    def due(self, seen: int) -> bool:
        """Whether so many tokens came since they were last scored that it is time again."""
        return self.spec.every is not None and seen - self.judged >= self.spec.every

    def evict(self, rows: Rows, keep: list[list[Tensor]]) -> None:
        """Leave of each sequence's KV heads the tokens of the masks ``keep``, bool ``[S]``."""
        self.judged = rows.total
        if spec_word(self.spec.keep) == "full" and all(one.all() for heads in keep for one in heads):
            self.known = self.known.all_kept()
            return
        known = self.known.kept(keep, self.spec.ragged)
        part = self.held(rows)
        if self.spec.ragged:
            self.segments = {RAGGED: part.apart(rows, keep, self.spec.after)}
            self._go_on(rows, 0, (0,) * rows.batch)
        else:
            self._leave_even(rows, part, keep)
        self.known = known

    def _leave_even(self, rows: Rows, part: Left, keep: list[list[Tensor]]) -> None:
        counts = [int(heads[0].sum()) for heads in keep]
        most = max(counts)
        pair = part.padded(rows, keep, counts)
        before = self.evicted or (0,) * rows.batch
        gone = (len(heads[0]) - count for heads, count in zip(keep, counts, strict=True))
        self.evicted = tuple(map(sum, zip(before, gone, strict=True)))
        starts = tuple(most - count for count in counts)
        self._go_on(rows, most, starts)
        self.inner.append(*pair, Rows(rows.batch, 0, most, starts if any(starts) else None))

    def _go_on(self, rows: Rows, held: int, starts: tuple[int, ...]) -> None:
        """An inner store for what comes now."""
        slack = self.slack
        self.cut = Cut(rows.total, held, starts)
        self.inner = self._new_inner()
        self.slack = slack

    def crop(self, rows: Rows, target: int) -> None:
        self.inner.crop(self.geometry(rows), target - (self.cut.gone if self.cut else 0))
        self.known.crop(target)
        self.judged = min(self.judged, target)

    def oldest_crop(self, total: int) -> int:
        gone = self.cut.gone if self.cut else 0
        return max(self.oldest_eviction, self.inner.oldest_crop(total - gone) + gone, self.known.oldest_crop)

    @property
    def oldest_eviction(self) -> int:
        """Slots seen when tokens left that are cached no more: there is no way back before that."""
        return self.cut.slots if self.cut else 0

    def reset(self) -> None:
        super().reset()
        slack = self.slack
        self._begin()
        self.slack = slack

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super().map_rows(change)
        self.inner.map_rows(change)
        order = change(torch.arange(self.batch)).tolist()
        with torch.inference_mode(False):  # as in new_segment
            self.known.map_rows(change, order)
        if self.cut is not None:
            self.cut = replace(self.cut, starts=tuple(self.cut.starts[row] for row in order))
            self.evicted = tuple(self.evicted[row] for row in order) if self.evicted else ()
        self.batch = len(order)

    def fork(self) -> EvictedStore:
        other = super().fork()
        other.inner = self.inner.fork()
        other.known = self.known.fork()
        return other

    def tensors(self) -> Iterator[Tensor]:
        yield from super().tensors()
        yield from self.inner.tensors()
        yield from self.known.tensors()

    def offloaded(self) -> dict[str, int]:
        return self.inner.offloaded()

    def saved(self, rows: Rows) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, plain = super().saved(rows)
        inner, plain["inner"] = self.inner.saved(self.geometry(rows))
        known, plain["known"] = self.known.saved()
        tensors |= {f"inner.{name}": x for name, x in inner.items()}
        tensors |= {f"known.{name}": x for name, x in known.items()}
        return tensors, {**plain, "cut": told_of(self.cut, self.evicted)}

    def check(self, saved: SavedStore) -> None:
        check(self, saved)

    def restore(self, read: Callable[[str], Tensor], plain: Mapping[str, Any], device: torch.device) -> None:
        super().restore(read, plain, device)
        self.cut, self.evicted = cut_of(plain["cut"])
        slack = self.slack
        self.inner = self._new_inner()
        self.slack = slack
        self.inner.restore(lambda name: read(f"inner.{name}"), plain["inner"], device)
        with torch.inference_mode(False):  # as in new_segment
            self.known.restore(lambda name: read(f"known.{name}"), plain["known"], device)
