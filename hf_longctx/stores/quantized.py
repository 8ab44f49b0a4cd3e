"""``store: quantized``: every token, the newest as they are and all others packed to 8 or 4 bits.

KIVI, arXiv:2402.02750: keys per channel in groups of tokens, values per token. A token is packed once, when it is old
enough, from its exact numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..config.bounds import MOST
from ..errors import ConfigError, UnsupportedModelError
from ..kernels._quantized import BLOCK, Quantised
from ..layout.heads import RoleHeads
from ..layout.rows import Rows
from ..layout.segments import HeadKV, Segment
from ._saved import SavedSegment, SavedStore, short
from .base import SLACK, Bytes, Reserve, Store, StoreSpec, room


@dataclass(frozen=True)
class Quantized(StoreSpec):
    """Cache every token, all but the newest of them quantised to ``bits`` bits an element.

    Of a sequence's T tokens the first ``packed(T)`` are quantised. Earlier tokens are read dequantised, the tokens of
    the current forward in full precision: a prompt read in one forward is read exactly.

    Attributes:
        bits: of a quantised element.
        group: tokens that are quantised together and share the step of a channel of the keys; a multiple of 16.
        residual: newest tokens in full precision; up to ``group`` - 1 more wait until a group is full.
    """

    roles = ("retrieval",)
    exact = False
    cases = ({"bits": 8, "group": 16, "residual": 8}, {"bits": 4, "group": 16, "residual": 0})

    bits: int = field(default=8, metadata={"choices": (8, 4)})
    group: int = field(default=64, metadata={"min": 16, "max": 1024, "unit": "tokens"})
    residual: int = field(default=128, metadata={"min": 0, "max": 2**30, "unit": "tokens"})

    def __post_init__(self) -> None:
        if self.group % 16:
            raise ConfigError(f"group: got {self.group}, expected a multiple of 16 (tokens).")

    def new(self, heads: RoleHeads, max_tokens: int | None) -> QuantizedStore:
        return QuantizedStore(self, heads, max_tokens)

    def packed(self, tokens: int) -> int:
        """How many of the first tokens of a row are packed after ``tokens`` of them."""
        return max(0, tokens - self.residual) // self.group * self.group

    def window(self, slack: int = SLACK) -> int:
        """Slots of the exact buffer: the newest tokens, what waits, what may be taken back, and room to write on."""
        return self.residual + 2 * self.group + slack + 1

    def cached_tokens(self, tokens: int) -> int:
        return tokens

    def capacity(self, tokens: int, reserve: Reserve) -> int:
        return sum(self._capacities(tokens, reserve))

    def _capacities(self, tokens: int, reserve: Reserve | None) -> tuple[int, int]:
        """Exact tokens, and quantised ones."""
        if reserve is None:
            packed = self.packed(tokens)
            return tokens - packed, packed
        window = self.window(reserve.slack)
        exact = room(min(tokens, window), reserve.max_tokens, window)
        return exact, self.packed(room(tokens, reserve.max_tokens))

    def nbytes(self, tokens: int, head_dim: int, itemsize: int, reserve: Reserve | None = None) -> Bytes:
        exact, packed = self._capacities(tokens, reserve)
        codes = 2 * packed * (head_dim * self.bits // 8)
        scales = 2 * itemsize * (packed // self.group * head_dim + packed)
        return Bytes(2 * exact * head_dim * itemsize + codes + scales)


@dataclass
class QuantisedKV(HeadKV):
    """Quantised pieces, then plain segments from slot ``low`` on, the last of which ends with the queries.

    Attributes:
        past: slots seen before this forward.
        low: slot of the first key of the plain segments.
    """

    past: int = 0
    low: int = 0

    def alone(self, rows: slice, start: int) -> list[Segment | Quantised]:
        count = self.spec.packed(self.past - start)
        pieces = [one.alone(rows, count) for one in self.segments if isinstance(one, Quantised) and one.first < count]
        plain = replace(self, segments=[one for one in self.segments if isinstance(one, Segment)])
        return [*pieces, *HeadKV.alone(plain, rows, start + count - self.low)]


class QuantizedStore(Store):
    """The newest tokens exact, in a buffer of padded positions; all older ones quantised, by row position.

        one sequence of 10 tokens, start 3, group 4, residual 2: packed(10) = 8

        padded position  0 1 2 3 4 5 6 7 8 9 10 11 12      Quantised  |0 1 2 3|4 5 6 7|    row positions
                         . . . 0 1 2 3 4 5 6 7  8  9       exact        5 6 7 8 9          from padded position base = 8
                                         ^ base                         ^ quantised too, kept to roll back exactly

    The buffer begins at padded position ``base``, early enough that ``slack`` tokens can be rolled back and are read
    exactly. When it is full, the compaction: what is still needed moves to its front, and ``base`` moves up.

        |old old old|n n n n|   ->   |n n n n|           |
         base        new base         base

    Groups are cut by row position, so a padded sequence equals the sequence alone.
    """

    kinds = (Segment, Quantised)
    numbers: ClassVar[tuple[str, ...]] = ("base",)

    def __init__(self, spec: Quantized, heads: RoleHeads, max_tokens: int | None):
        super().__init__(spec, heads, max_tokens)
        self.base = 0

    @property
    def pieces(self) -> list[Quantised]:
        """What is packed, in the order of the tokens; all but the last may be shared with forks."""
        found = (segment for segment in self.segments.values() if isinstance(segment, Quantised))
        return sorted(found, key=lambda piece: piece.first)

    def append(self, k: Tensor, v: Tensor, rows: Rows) -> HeadKV:
        spec = self.spec
        starts = rows.starts or (0,)
        if spec.bits == 4 and (k.shape[3] | v.shape[3]) % 2:
            raise UnsupportedModelError(
                f"store quantized was given keys and values of {k.shape[3]} and {v.shape[3]} channels: to 4 bits it "
                "packs an even number of them. Use bits: 8 for this model."
            )
        if (kept := self.segments.get("exact")) is not None:  # filled in another dtype (autocast), it stays in that
            k = k.to(kept.dtype)
            v = v.to(kept.dtype)
        self._make_room(k, v, rows)
        self._pack(k, v, rows)
        read = [spec.packed(rows.past - start) for start in starts]
        low = min(rows.past, *(start + count for start, count in zip(starts, read, strict=True)))
        plain = self._write(k, v, rows, low)
        if rows.past == 0:
            low = 0
            plain = [Segment(*self.incoming(k, v), rows.new)]
        if rows.new == 1 and rows.padded:
            plain[0].bias, plain[0].bias_of_pads = _hidden(rows, low, read, plain[0].k), True
        seen = (piece.seen(read, rows.ints) for piece in self.pieces if piece.first < max(read))
        return QuantisedKV(self.heads, [*seen, *plain], spec, state=self.state, past=rows.past, low=low)

    def held(self, rows: Rows) -> QuantisedKV:
        starts = rows.starts or (0,)
        read = [self.spec.packed(rows.total - start) for start in starts]
        low = min(rows.total, *(start + count for start, count in zip(starts, read, strict=True)))
        kept = self.segments["exact"]
        k, v = (x[:, :, low - self.base : rows.total - self.base] for x in (kept.k, kept.v))
        seen = [piece.seen(read, rows.ints) for piece in self.pieces if piece.first < max(read)]
        plain = Segment(k, v, rows.total - low)
        return QuantisedKV(self.heads, [*seen, plain], self.spec, state=self.state, past=rows.total, low=low)

    def _make_room(self, k: Tensor, v: Tensor, rows: Rows) -> None:
        """Room for what is packed by now, and until the tokens outgrow what a buffer of all of them would have."""
        total = rows.total
        own = self.segments.get("packed")
        first = own.first if own else max((piece.end for piece in self.pieces), default=0)
        needed, slots = (max(0, self.spec.packed(n) - first) for n in (total, room(total, self.max_tokens)))
        if needed <= (own.slots if own else 0) <= slots and (own or rows.past or not slots):
            return
        heads = len(self.heads.kv_heads)
        spec = self.spec
        grown = Quantised.empty(k, v, heads, slots, spec.bits, spec.group, first)
        if own is not None:
            grown.copy_from(own)
        self.segments["packed"] = grown

    def _pack(self, k: Tensor, v: Tensor, rows: Rows) -> None:
        """Pack the tokens that have become old enough, a piece at a time."""
        fewest = []
        for group, start in rows.groups():
            done, due = (self.spec.packed(slots - start) for slots in (rows.past, rows.total))
            fewest.append(due)
            batch = 1 if rows.padded else rows.batch
            step = self.spec.group
            step *= max(1, BLOCK // (batch * len(self.heads.kv_heads) * k.shape[3] * step))
            for low in range(done, due, step):
                own = self.segments["packed"]
                span = self._span(k, v, rows, group, start + low, start + min(due, low + step))
                own.write(group, low - own.first, *span)
        if (own := self.segments.get("packed")) is not None:
            own.whole = max(0, min(fewest) - own.first)

    def _span(self, k: Tensor, v: Tensor, rows: Rows, group: slice, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Exact keys and values of the slots ``low .. high``: kept before, or brought by this forward."""
        parts = []
        past = rows.past
        if low < past:
            kept = self.segments["exact"]
            cut = slice(low - self.base, min(high, past) - self.base)
            parts.append((kept.k[group, :, cut], kept.v[group, :, cut]))
        if high > past:
            cut = slice(max(low, past) - past, high - past)
            parts.append(tuple(self.heads.take(x[group, :, cut]).detach() for x in (k, v)))
        return parts[0] if len(parts) == 1 else tuple(torch.cat(pair, 2) for pair in zip(*parts, strict=True))

    def _write(self, k: Tensor, v: Tensor, rows: Rows, low: int) -> list[Segment]:
        """Keep the newest tokens; plain segments of the slots from ``low`` on, the last ending with the new ones."""
        spec = self.spec
        past = rows.past
        total = rows.total
        starts = rows.starts or (0,)
        window = spec.window(self.slack)
        kept = self.grow("exact", k, v, min(total, window), window)
        begin = past
        old = None
        if total - self.base > kept.k.shape[2]:
            ends = [start + spec.packed(total - self.slack - start) for start in starts]
            if rows.new == 1:
                ends.append(low)  # a token reads exactly what is packed for it alone
            base = max(self.base, min(ends))
            if rows.new > 1:
                cut = slice(low - self.base, past - self.base)
                old = Segment(kept.k[:, :, cut].clone(), kept.v[:, :, cut].clone(), past - low)
            if base < past:
                cut = slice(base - self.base, past - self.base)
                for x in (kept.k, kept.v):
                    x[:, :, : past - base] = x[:, :, cut].clone()
            self.base, begin = base, max(past, base)
        for into, x in ((kept.k, k), (kept.v, v)):
            self.heads.copy_to(into[:, :, begin - self.base : total - self.base], x[:, :, begin - past :])
        kept.length = total - self.base
        if old is None:
            cut = slice(low - self.base, total - self.base)
            return [Segment(kept.k[:, :, cut], kept.v[:, :, cut], total - low)]
        return [old, Segment(*self.incoming(k, v), rows.new)]

    def crop(self, rows: Rows, target: int) -> None:
        kept = self.segments.get("exact")
        starts = rows.starts or (0,)
        if kept is None:
            return
        counts = [self.spec.packed(target - start) for start in starts]
        low = min(target, *(start + count for start, count in zip(starts, counts, strict=True)))
        if low < self.base:
            self._unpack(rows, kept, low, target)
        kept.length = target - self.base
        self._trim(min(counts), max(counts))

    def _unpack(self, rows: Rows, kept: Segment, low: int, target: int) -> None:
        """Let the exact buffer begin at slot ``low``, with what was packed where the exact numbers are gone."""
        end = min(self.base, target)
        left = max(0, target - self.base)
        for x in (kept.k, kept.v):
            x[:, :, end - low : end - low + left] = x[:, :, :left].clone()
            x[:, :, : end - low] = 0  # where a row begins later
        for group, start in rows.groups():
            for piece in self.pieces:
                a = max(low - start, piece.first)
                b = min(end - start, piece.end)
                if a < b:
                    found = piece.alone(group, b).unpack(a - piece.first, b - piece.first)
                    for into, x in zip((kept.k, kept.v), found, strict=True):
                        into[group, :, a + start - low : b + start - low] = x
        self.base = low

    def _trim(self, fewest: int, most: int) -> None:
        """Forget what rows packed after their first ``fewest`` to ``most`` tokens; none of it stays shared."""
        pieces = self.pieces
        if own := self.segments.get("packed"):
            own.whole = max(0, min(own.whole, fewest - own.first))
        if not any(piece.shared and piece.end > fewest for piece in pieces):
            return
        names = {id(segment): name for name, segment in self.segments.items()}
        for piece in pieces:
            name = names[id(piece)]
            if piece.first >= fewest or not piece.shared:
                del self.segments[name]
            elif piece.end > fewest:
                self.segments[name] = piece.cut(0, fewest - piece.first, shared=True)
        if fewest < most:
            like = self.segments["exact"]
            heads = len(self.heads.kv_heads)
            spec = self.spec
            own = Quantised.empty(like.k, like.v, heads, most - fewest, spec.bits, spec.group, fewest)
            for piece in pieces:
                own.copy_from(piece)
            self.segments["packed"] = own

    def check(self, saved: SavedStore) -> None:
        seen = saved.rows.total
        parts = saved.segments()
        counts = [self.spec.packed(seen - start) for start in saved.starts]
        exact = min(seen, *(start + count for start, count in zip(saved.starts, counts, strict=True)))
        base = saved.number("base", max(0, seen - self.spec.window()), exact)
        if "exact" not in parts:
            saved.refuse(f"its segments are {short(list(parts))}, expected exact among them")
        parts.pop("exact").plain(seen - base, seen - base, self.spec.window())
        own = parts.pop("packed", None)
        end = 0
        if not all(name.startswith("shared ") for name in parts):
            saved.refuse(f"its segments are {short(list(parts))}, expected those of forks (shared ...)")
        for piece in parts.values():  # of what all rows had packed, one after the other
            end += self._check_piece(piece, end, (1, min(counts) - end))
        most = max(0, max(counts) - end)
        if own is not None:
            self._check_piece(own, end, (most, most), whole=max(0, min(counts) - end))
        elif most:
            saved.refuse(f"{most} packed tokens of its longest row are in no segment")

    def _check_piece(self, piece: SavedSegment, first: int, held: tuple[int, int], whole: int | None = None) -> int:
        """Tokens of a piece that begins at row position ``first``: from ``held[0]`` to ``held[1]``.

        ``whole``: most slots that all rows filled, in the piece to which others are added; a shared one is full.
        """
        told = piece.of_kind(Quantised, "bits", "group", "first", "whole", "shared", "rows", "slots")
        spec = self.spec
        shared = whole is None
        shape = piece.shape("k")
        for name, value in (("bits", spec.bits), ("group", spec.group), ("first", first)):
            told[name].number(value, value)
        count = shape[2] if len(shape) == 4 else -1
        if not held[0] <= count <= held[1]:
            told["slots"].refuse(f"its keys are {list(shape)}, expected {held[0]} to {held[1]} tokens")
        slots = told["slots"].number(count, count if shared else max(count, self.max_tokens or MOST))
        filled = told["whole"].number(count if shared else 0, count if shared else whole)
        if slots % spec.group or filled % spec.group:
            told["slots"].refuse(f"got {slots}, of which {filled} are whole, expected groups of {spec.group} tokens")
        rows = (piece.rows(told, shared), piece.store.heads)
        dim = piece.store.head_dim
        piece.holds(Quantised.shapes(rows, dim, dim, count, spec.bits, spec.group, piece.store.dtype))
        return count

    def restored(
        self, kind: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, int], device: torch.device
    ) -> Segment | Quantised:
        if kind == Quantised.saved_as and self.max_tokens is None:  # as in Store.restored
            most = 2 * room(tensors["k"].shape[2] + SLACK, None) // self.spec.group * self.spec.group
            numbers = {**numbers, "slots": min(numbers["slots"], most)}
        return super().restored(kind, tensors, numbers, device)

    def filled(self, rows: Rows) -> dict[str, Segment | Quantised]:
        """Slots that no token of their row fills are left out, or zeros where another row fills them."""
        counts = [(group, self.spec.packed(rows.total - start)) for group, start in rows.groups()]
        parts = dict(self.segments)
        for name, piece in parts.items():
            if isinstance(piece, Quantised):
                held = [(group, min(max(0, count - piece.first), piece.slots)) for group, count in counts]
                parts[name] = piece.blanked(held)
        return parts

    def fork(self) -> QuantizedStore:
        own = self.segments.get("packed")
        if own is not None:
            segments = {name: segment for name, segment in self.segments.items() if name != "packed"}
            if own.whole:
                segments[f"shared {len(segments)}"] = own.cut(0, own.whole, shared=True)
            if own.whole < own.slots:
                segments["packed"] = own.cut(own.whole, own.slots)
            self.segments = segments  # at once: other threads may be forking it too
        return super().fork()

    def reset(self) -> None:
        super().reset()
        self.base = 0


def _hidden(rows: Rows, low: int, read: list[int], like: Tensor) -> Tensor:
    """Score bias ``[B, 1, 1, total - low]`` that hides from each row its pads and what it reads packed."""

    def make() -> Tensor:
        first = torch.tensor(
            [start + count for start, count in zip(rows.starts, read, strict=True)], device=like.device
        )
        slots = torch.arange(low, rows.total, device=like.device)
        bias = torch.zeros(rows.batch, 1, 1, rows.total - low, dtype=like.dtype, device=like.device)
        return bias.masked_fill_(slots < first[:, None, None, None], float("-inf"))

    return rows.memo(("hidden", low, tuple(read), like.device, like.dtype), make)
