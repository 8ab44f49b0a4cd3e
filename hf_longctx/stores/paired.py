"""``store: paired``: every token; once a prompt has ended, neighbouring layers share its directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config.bounds import MOST_LAYERS, SHARE
from ..layout.gather import keys_and_values, take
from ..layout.heads import RoleHeads
from ..layout.merged import TENSORS, Directions, Half, Merged
from ..layout.pieces import pieces
from ..layout.rows import Rows
from ..layout.segments import Segment
from ._pieces import PiecesStore
from ._saved import SavedSegment, SavedStore
from .base import Store, StoreSpec

SINGLE = "store paired: layers that have other retrieval heads than their neighbour share nothing with it"
TEMPORARY = 1 << 20  # numbers of the keys that are merged at once


@dataclass(frozen=True)
class Paired(StoreSpec):
    """Cache every token; of a prompt, two neighbouring layers share the directions of keys and values.

    MiniCache, arXiv:2405.14366. A prompt is read as `full` reads it. Where it ends, the layers from ``start`` on are
    taken by twos: of each token and KV head a key (and a value) is kept as one direction for both layers, between the
    two along the arc (SLERP), and its length in each. Tokens whose directions are furthest apart stay exact in both,
    and so do opposite ones. All that comes later is exact until the next prompt ends. Layers that have other retrieval
    heads than their neighbour share nothing with it and stay full.

    The paper's parameters could not be read: ``t``, ``retain`` and the choice of tokens by angle, for keys and values
    apart, are this package's reading of it.

    Attributes:
        t: where on the arc the shared direction is: 0 is that of the lower layer, 1 that of the upper one.
        retain: share of a sequence's tokens that stay exact, rounded up.
        start: layer from which on layers are paired; null: half of them.
    """

    roles = ("retrieval",)
    rule = "data"
    exact = False
    cases = ({"retain": 0.1, "start": 0},)

    t: float = field(default=0.6, metadata=SHARE)
    retain: float = field(default=0.05, metadata=SHARE)
    start: int | None = field(default=None, metadata={"min": 0, "max": MOST_LAYERS - 1, "unit": "layer index"})

    def new(self, heads: RoleHeads, max_tokens: int | None) -> PairedStore:
        return PairedStore(self, heads, max_tokens)

    @property
    def reads_all(self) -> bool:
        return True

    def cached_tokens(self, tokens: int) -> int:
        """All of them: which layers are paired is not known here, so its bytes are said to be those of `full`."""
        return tokens

    @property
    def counted(self) -> bool:
        return False

    def across(self, stores: Sequence[Store | None], rows: Rows) -> None:
        first = len(stores) // 2 if self.start is None else self.start
        for low in range(first, len(stores), 2):
            two = [store for store in stores[low : low + 2] if isinstance(store, PairedStore)]
            alike = len(two) == 2 and two[0].heads.kv_heads == two[1].heads.kv_heads
            for store in two:
                store.single = not alike
            if alike:
                pair(*two, rows)


class PairedStore(PiecesStore):
    """A piece is what a prompt left; the other layer of the pair has one with the same directions.

    Attributes:
        single: its layer has no other to be paired with.
    """

    kinds = (Segment, Merged)
    numbers = ()
    word = "pair"
    single = False

    @property
    def note(self) -> str | None:
        return SINGLE if self.single else None

    def oldest_crop(self, total: int) -> int:
        """Where the last prompt ended that was paired."""
        return self.past

    def check(self, saved: SavedStore) -> None:
        found, parts = self._check_pieces(saved, Merged)
        slots = 0
        for piece in found:
            slots += self._check_piece(piece, saved.rows.total - slots)
        list(self._check_parts(saved, parts, len(found), slots))
        saved.state(saved.dtype)

    def _check_piece(self, piece: SavedSegment, most: int) -> int:
        """Slots of a piece, at most ``most``."""
        told = piece.of_kind(Merged, "rows", "shared")
        slots, batch = self._slots(piece, "k_unit", most)
        store = piece.store
        told["rows"].number(store.rows.batch, store.rows.batch)
        told["shared"].number(0, 1)
        form = {}
        heads = (batch, store.heads)
        for part in ("k", "v"):
            shape = piece.shape(f"{part}_at")
            count = shape[2] if len(shape) == 3 else 0
            sizes = ((slots, store.head_dim), (count,), (slots,), (count, store.head_dim))
            for name, size in zip(TENSORS, sizes, strict=True):
                form[f"{part}_{name}"] = (torch.int64 if name == "at" else store.dtype, (*heads, *size))
        piece.holds(form)
        for part in ("k", "v"):
            at = piece.read(f"{part}_at")
            if not ((at >= 0) & (at <= slots)).all() or not ((at.diff(dim=2) > 0) | (at[..., 1:] == slots)).all():
                piece.told["tensors"].refuse(f"{part}_at are not ascending slots of {slots}")
        return slots


@torch.no_grad()
def pair(lower: PairedStore, upper: PairedStore, rows: Rows) -> None:
    """Let two layers share the directions of the slots that neither has in a piece; ``rows`` are all that was seen."""
    done = lower.past
    if done != upper.past or rows.total <= done:
        return
    plain = (lower.plain, upper.plain)
    with torch.inference_mode(False), torch.autocast(plain[0][0].k.device.type, enabled=False):
        halves = [_halves(plain, part, rows, done, lower.spec) for part in (0, 1)]
        made = []
        for store, own, k, v in zip((lower, upper), plain, *halves, strict=True):
            kept = store._kept(own, done, rows.total, rows.total)
            name = f"{store.word} {len(store.pieces)}"
            made.append({**store.pieces, name: Merged(k, v), "kept": kept})
    lower.segments, upper.segments = made


def _halves(plain: Sequence[Sequence[Segment]], part: int, rows: Rows, done: int, spec: Paired) -> tuple[Half, Half]:
    """Keys (``part`` 0) or values (1) of both layers, of all slots from ``done`` on."""
    like = (plain[0][0].k, plain[0][0].v)[part]
    count = rows.total - done
    unit = like.new_empty(*like.shape[:2], count, like.shape[3])
    norms = [like.new_empty(unit.shape[:3]) for _ in plain]
    angle = like.new_empty(unit.shape[:3], dtype=torch.promote_types(like.dtype, torch.float32))
    for some in pieces(count, unit[:, :, 0].numel(), TEMPORARY):
        x, y = (keys_and_values(one, some.start, some.stop)[part].to(angle.dtype) for one in plain)
        for into, z in zip(norms, (x, y), strict=True):
            into[:, :, some] = z.norm(dim=3)
        unit[:, :, some], angle[:, :, some] = between(x, y, spec.t)
    at = _furthest(angle, rows, done, spec.retain)
    common = Directions(unit, at)
    return tuple(
        Half(common, norm, take(one, at.clamp(max=count - 1))[part]) for one, norm in zip(plain, norms, strict=True)
    )


def between(x: Tensor, y: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """The direction at ``t`` of the arc from that of x to that of y ``[..., D]``, and the angle ``[...]``.

    Where one of the two is zero it is the other's. Between opposite ones there are many arcs: then it is that of x, and
    the angle infinite.
    """
    a, b = (z / z.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny) for z in (x, y))
    angle = 2 * torch.atan2((a - b).norm(dim=-1, keepdim=True), (a + b).norm(dim=-1, keepdim=True))
    sine = angle.sin()
    near = torch.finfo(x.dtype).eps ** 0.5
    straight = sine < near
    sine = sine.masked_fill(straight, 1)
    weights = [
        torch.where(straight, plain, (plain * angle).sin() / sine) for plain in (torch.full_like(angle, 1 - t), t)
    ]
    opposite = straight & (angle > 1)
    made = torch.where(opposite, a, weights[0] * a + weights[1] * b)
    zero = [z.eq(0).all(-1, keepdim=True) for z in (x, y)]
    made = torch.where(zero[0], b, torch.where(zero[1], a, made))
    return made, angle.masked_fill(opposite, float("inf")).squeeze(-1)


def _furthest(angle: Tensor, rows: Rows, done: int, retain: float) -> Tensor:
    """Slots of the largest angles ``[B, n, S]``, a share of each sequence's, and all infinite ones: `Directions.at`."""
    count = angle.shape[2]
    chosen = torch.zeros_like(angle, dtype=torch.bool)
    for group, start in rows.groups():
        low = min(max(0, start - done), count)
        own = angle[group, :, low:]
        order = own.sort(dim=2, descending=True, stable=True).indices
        mask = own == float("inf")
        mask.scatter_(2, order[..., : math.ceil((count - low) * retain - 1e-9)], True)
        chosen[group, :, low:] = mask
    slots = torch.arange(count, device=angle.device).expand_as(chosen)
    most = int(chosen.sum(2).max()) if chosen.numel() else 0
    return slots.masked_fill(~chosen, count).sort(2).values[..., :most].contiguous()
