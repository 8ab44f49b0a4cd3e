"""What a cache's file says of a store of which tokens are evicted, and what must be true of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..layout.ragged import Ragged
from ._left import Cut
from ._saved import SavedStore, Told, short

if TYPE_CHECKING:
    from ._evicted import EvictedStore

CUT = ("slots", "held", "starts", "evicted")


def told_of(cut: Cut | None, evicted: tuple[int, ...]) -> dict[str, Any] | None:
    """A cut as plain data that JSON can hold, and the tokens that are gone of each sequence."""
    return None if cut is None else dict(zip(CUT, (cut.slots, cut.held, cut.starts, evicted), strict=True))


def cut_of(plain: dict[str, Any] | None) -> tuple[Cut | None, tuple[int, ...]]:
    """What `told_of` was given."""
    if plain is None:
        return None, ()
    return Cut(plain["slots"], plain["held"], tuple(plain["starts"])), tuple(plain["evicted"])


def check(store: EvictedStore, saved: SavedStore) -> None:
    """See `Store.check`; ``store`` is empty."""
    rows = saved.rows
    saved.number("batch", rows.batch, rows.batch)
    cut = _check_cut(store, saved)
    saved.number("judged", 0 if cut is None else cut.slots, rows.total)
    lengths = _check_ragged(store, saved, cut)
    store.cut = cut
    inner = store._new_inner()
    store.cut = None
    own = SavedStore(
        saved.part("inner"),
        saved.tensors,
        f"{saved.prefix}inner.",
        rows if cut is None else cut.of(rows),
        saved.heads,
        saved.head_dim,
        saved.dtype,
        False,
        saved.group,
        inner.parts,
    )
    inner.check(own)
    own.close()

    def cached(row: int, head: int, tokens: int) -> int:
        """Of a sequence's first ``tokens`` tokens, how many a KV head has."""
        if cut is None:
            return tokens
        before = _before(cut, rows.start(row))
        held = cut.held - cut.starts[row] if lengths is None else int(lengths[row, head])
        return held + max(0, tokens - before)

    store.known.check(saved, saved.part("known"), f"{saved.prefix}known.", cached)


def _before(cut: Cut, start: int) -> int:
    """Real tokens that a sequence had at the cut."""
    return max(0, cut.slots - start)


def _check_cut(store: EvictedStore, saved: SavedStore) -> Cut | None:
    told = saved.part("cut")
    if told.value is None:
        return None
    fields = told.fields(*CUT)
    rows = saved.rows
    slots = fields["slots"].number(1, rows.total)
    held = fields["held"].number(0, 0 if store.spec.ragged else slots)
    before = [max(0, slots - rows.start(row)) for row in range(rows.batch)]
    starts = []
    for tokens, one in zip(before, fields["starts"].items(rows.batch), strict=True):
        starts.append(one.number(max(0, held - tokens), held))
    if store.spec.ragged:
        fields["evicted"].items(0)
    else:
        if min(starts) > 0:
            fields["starts"].refuse(f"got {short(starts)}, expected a sequence that has all {held} tokens")
        for tokens, start, one in zip(before, starts, fields["evicted"].items(rows.batch), strict=True):
            one.number(tokens - (held - start), tokens - (held - start))
    return Cut(slots, held, tuple(starts))


def _check_ragged(store: EvictedStore, saved: SavedStore, cut: Cut | None) -> torch.Tensor | None:
    """Lengths of what is left head by head ``[B, n]``; None where nothing is."""
    parts = saved.segments()
    names = ["ragged"] if store.spec.ragged and cut is not None else []
    if list(parts) != names:
        saved.refuse(f"its segments are {short(list(parts))}, expected {short(names)}")
    saved.state(torch.float32)
    if not names:
        return None
    part = parts["ragged"]
    part.of_kind(Ragged)
    count = (part.shape("k") or (0,))[0]
    by_head = (torch.int64, (saved.rows.batch, saved.heads))
    tensors = dict.fromkeys(("k", "v"), (saved.dtype, (count, saved.head_dim)))
    tensors |= {"positions": (torch.int32, (count,)), "starts": by_head, "lengths": by_head}
    if store.spec.after.biased:
        tensors["score_bias"] = (torch.float32, (count,))
    part.holds(tensors)
    starts, lengths, positions = (part.read(name) for name in ("starts", "lengths", "positions"))
    _check_parts(saved, part.told["tensors"], starts, lengths, count)
    for row in range(saved.rows.batch):
        before = _before(cut, saved.rows.start(row))
        for start, length in zip(starts[row].tolist(), lengths[row].tolist(), strict=True):
            own = positions[start : start + length].to(torch.int64)
            if length and not (own[0] >= 0 and own[-1] < before and bool((own.diff() > 0).all())):
                part.told["tensors"].refuse(f"positions of row {row} are not ascending from 0 to {before - 1}")
    return lengths


def _check_parts(saved: SavedStore, told: Told, starts: torch.Tensor, lengths: torch.Tensor, count: int) -> None:
    """That the parts of the heads are all of the flat buffer, and none overlaps another but as the same part."""
    if bool((lengths < 0).any()) or bool((starts < 0).any()) or bool((starts > count).any()):
        told.refuse(f"starts or lengths are outside of its {count} tokens")
    end = 0
    for start, length in sorted(set(zip(starts.flatten().tolist(), lengths.flatten().tolist(), strict=True))):
        if length:
            if start != end:
                told.refuse(f"a head's tokens begin at {start}, expected {end}, where those before them end")
            end += length
    if end != count:
        told.refuse(f"the heads have {end} of its {count} tokens")
