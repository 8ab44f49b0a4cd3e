"""Stores that keep what a prompt left in another form than the tokens that come after: pieces, then plain segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..layout.gather import spans
from ..layout.rows import Rows
from ..layout.segments import HeadKV, Segment
from ..layout.streamed import Piece
from ._saved import SavedSegment, SavedStore, short
from .base import room
from .full import FullStore


@dataclass
class PiecesKV(HeadKV):
    """Pieces, then plain segments, the last of which ends with the queries."""

    def alone(self, rows: slice, start: int) -> list[Segment | Piece]:
        left = []
        plain = []
        for one in self.segments:
            if isinstance(one, Segment):
                plain.append(one)
                continue
            if start < one.length:
                left.append(one.alone(rows, start))
            start = max(0, start - one.length)
        return [*left, *HeadKV.alone(replace(self, segments=plain), rows, start)]


class PiecesStore(FullStore):
    """As a full store, in which pieces take the place of the first slots where a prompt ends.

        slot        0 . . . . . . . . . | . . . . . . . . . . .
                    WORD 0    WORD 1    | kept: whole tokens  room
                                        ^ past

    Left pads are in them with the rest: a slot of the batch is a slot here. To a piece nobody writes, so forks and
    sequences of one prompt share it.

    Attributes:
        word: begins the names of the pieces.
    """

    word: ClassVar[str]
    staggers = False

    @property
    def pieces(self) -> dict[str, Piece]:
        """In the order of the slots."""
        return {name: segment for name, segment in self.segments.items() if isinstance(segment, Piece)}

    @property
    def plain(self) -> list[Segment]:
        """Views of all other slots."""
        return [segment for segment in self._views() if isinstance(segment, Segment)]

    @property
    def past(self) -> int:
        """Slots that are in pieces."""
        return sum(piece.length for piece in self.pieces.values())

    def append(self, k: Tensor, v: Tensor, rows: Rows) -> HeadKV:
        for piece in self.pieces.values():  # filled in another dtype (autocast), it stays in that
            k, v = k.to(piece.dtype), v.to(piece.dtype)
        return super().append(k, v, rows)

    def _kept(self, plain: Sequence[Segment], past: int, end: int, total: int) -> Segment:
        """A buffer of the slots ``end .. total``; ``plain`` has those from ``past`` on."""
        limit = None if self.max_tokens is None else self.max_tokens - end
        kept = self.new_segment(plain[0].k, plain[0].v, room(total - end, self.max_tokens, limit))
        for k, v in spans(plain, end - past, total - past):
            own = slice(kept.length, kept.length + k.shape[2])
            kept.k[:, :, own], kept.v[:, :, own] = k, v
            kept.length = own.stop
        return kept

    def _views(self) -> list[Segment | Piece]:
        return [
            segment if isinstance(segment, Piece) else Segment(*segment.contents(), segment.length)
            for segment in self.segments.values()
        ]

    def _shown(self, segments: list[Segment | Piece]) -> HeadKV:
        return PiecesKV(self.heads, segments, self.spec)

    def _hide_pads(self, segments: list[Segment | Piece], rows: Rows) -> list[Segment | Piece]:
        low = 0
        parts = []
        for one in segments:
            own = rows.pad_bias(next(one.tensors()).device, one.dtype)[..., low : low + one.length]
            plain = isinstance(one, Segment)
            parts.append(replace(one, bias=own, bias_of_pads=True) if plain else replace(one, hidden=own))
            low += one.length
        return parts

    def _share(self) -> None:
        super()._share()
        self.segments = {
            name: replace(one, shared=True) if isinstance(one, Piece) else one for name, one in self.segments.items()
        }

    def _check_pieces(self, saved: SavedStore, kind: type[Piece]) -> tuple[list[SavedSegment], dict[str, SavedSegment]]:
        """What a file says of the pieces, which come first, and of the other segments."""
        parts = saved.segments()
        names = [name for name, part in parts.items() if part.told["kind"].value == kind.saved_as]
        if list(parts)[: len(names)] != [f"{self.word} {at}" for at in range(len(names))]:
            saved.refuse(f"its segments are {short(list(parts))}, expected {self.word} 0, ... first")
        return [parts.pop(name) for name in names], parts

    def _slots(self, piece: SavedSegment, name: str, most: int) -> tuple[int, int]:
        """Slots of a piece, at most ``most``, by its tensor ``name``; and its rows."""
        shape = piece.shape(name)
        slots = shape[2] if len(shape) > 2 else 0
        if not 1 <= slots <= most:
            piece.told["tensors"].refuse(f"{name} is {list(shape)}, expected 1 to {most} tokens")
        batch = piece.store.rows.batch
        return slots, 1 if shape[0] == 1 else batch
