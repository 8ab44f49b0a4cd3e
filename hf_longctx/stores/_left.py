"""What an eviction leaves of the tokens of some heads, and where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..eviction.after.base import After
from ..layout.ragged import Ragged
from ..layout.rows import Rows
from ..layout.segments import HeadKV, Segment, joined
from ..layout.streamed import Streamed

ALL = -1  # stands for all sequences of a batch, or all KV heads

Masks = Sequence[Sequence[Tensor]]  # bool [S] of each sequence's KV heads: the cached tokens that are kept


@dataclass(frozen=True)
class Cut:
    """The geometry of what an eviction left.

        padded position      0 . . . . . . . . slots | new tokens          before
        in the inner store              0 . . . held | new tokens          after: ``slots - held`` fewer

    Attributes:
        slots: seen when it happened.
        held: of them in the inner store.
        starts: first real slot of each sequence in the inner store, if it had begun.
    """

    slots: int
    held: int
    starts: tuple[int, ...]

    @property
    def gone(self) -> int:
        return self.slots - self.held

    def start(self, row: int, start: int) -> int:
        """First real slot in the inner store of a sequence that begins at the padded position ``start``."""
        return self.starts[row] if start < self.slots else start - self.gone

    def of(self, rows: Rows) -> Rows:
        """The rows as the inner store has them."""

        def make() -> Rows:
            past = max(0, rows.past - self.gone)
            ends = None if rows.ends is None else tuple(end - self.gone for end in rows.ends)
            starts = tuple(self.start(row, rows.start(row)) for row in range(rows.batch))
            return Rows(rows.batch, past, rows.total - self.gone - past, starts if any(starts) else None, ends)

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
        own = self.inner.alone(rows, start if self.cut is None else self.cut.start(rows.start or 0, start))
        return own if self.ragged is None else [self.ragged.alone(rows), *own]

    def tokens(self, group: slice, start: int, head: int) -> tuple[Tensor, Tensor]:
        """k, v ``[b, n', S, D]`` of sequences that begin at one slot: of `ALL` heads, where they are even, or one.

        Of ragged heads: of one sequence and one head.
        """
        segments = self.alone(group, start)
        if not segments:  # a sequence that has not begun
            return tuple(x[group, :, :0] for x in joined(self.inner.segments))
        if head == ALL:
            return joined(segments)
        ragged, *plain = segments
        own = ragged.head(0, head)
        pairs = [(own.k, own.v), *((one.k[:, head : head + 1], one.v[:, head : head + 1]) for one in plain)]
        return tuple(torch.cat(pair, 2) for pair in zip(*pairs, strict=True))

    def padded(self, rows: Rows, keep: Masks, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The tokens ``keep`` of even heads, k, v ``[B, n, S, D]``, behind zeros where a sequence has fewer of them."""
        pair = None
        for row, masks in enumerate(keep):
            own = self.tokens(slice(row, row + 1), rows.start(row), ALL)
            if pair is None:
                pair = tuple(x.new_zeros(rows.batch, x.shape[1], max(counts), x.shape[3]) for x in own)
            for into, x in zip(pair, own, strict=True):
                for head, mask in enumerate(masks):
                    into[row, head, max(counts) - counts[row] :] = x[0, head, mask]
        return pair

    def apart(self, rows: Rows, keep: Masks, after: After) -> Ragged:
        """What is left of each head by itself once the tokens ``keep`` stay."""
        parts = []
        for row, masks in enumerate(keep):
            one, (_, processed) = slice(row, row + 1), rows.real(row)
            if self.ragged is None:
                k, v = self.tokens(one, rows.start(row), ALL)
                tokens = [(k[:, [head]], v[:, [head]]) for head in range(len(masks))]
            else:
                tokens = [self.tokens(one, rows.start(row), head) for head in range(len(masks))]
            parts.append(
                [self._left(row, head, mask, *tokens[head], processed, after) for head, mask in enumerate(masks)]
            )
        return Ragged.of(parts)

    def _left(
        self, row: int, head: int, keep: Tensor, k: Tensor, v: Tensor, processed: int, after: After
    ) -> tuple[Tensor, ...]:
        """What is left of one KV head: k, v, positions, and the bias where there may be one."""
        k, v = k[0, 0], v[0, 0]
        before = slice(0, 0) if self.ragged is None else self.ragged.of_head(row, head)
        old = before.stop - before.start
        positions = torch.arange(processed - (len(k) - old), processed, device=k.device, dtype=torch.int32)
        bias = torch.zeros(len(k), device=k.device) if after.biased else None
        if self.ragged is not None:
            positions = torch.cat([self.ragged.positions[before], positions])
            if after.biased and self.ragged.score_bias is not None:
                bias[:old] = self.ragged.score_bias[before]
        left = after.apply(k, v, bias, keep)
        one = (left.k, left.v, positions[keep])
        return (*one, left.bias) if after.biased else one
