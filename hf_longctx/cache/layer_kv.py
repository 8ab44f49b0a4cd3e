"""What one layer's cache hands to the attention function, and one token that is written together with its attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedModeError
from ..layout.forward import Forward
from ..layout.segments import HeadKV, Place, Segment

if TYPE_CHECKING:
    from .layer import LongCtxLayer

NAME = "longctx"  # the word under which the patched attention function is registered

NOT_OURS = (
    "a LongCtxCache reached an attention function that is not the patched one: the model is not patched, or was "
    "unpatched while the cache lived. Patch it again, or start with a new cache."
)


@dataclass
class Pending:
    """One new token of each sequence, which has its places in a layer and is not written yet.

    Attributes:
        k, v: ``[B, H_kv, 1, D]``.
        places: one per store of the layer.
        total: tokens that the layer has seen with it.
    """

    layer: LongCtxLayer
    k: Tensor
    v: Tensor
    places: list[Place]
    total: int

    def write(self) -> list[HeadKV]:
        """Write it, and what it reads: as the stores' `append` would have given it."""
        parts = []
        self.layer.whole = False
        for store, (segment, slot, length, _, before) in zip(self.layer.stores, self.places, strict=True):
            store.heads.copy_to(segment.k[:, :, slot : slot + 1], self.k)
            store.heads.copy_to(segment.v[:, :, slot : slot + 1], self.v)
            seen = Segment(segment.k[:, :, :length], segment.v[:, :, :length], length)
            parts.append(store.shown([seen], before))
        for part, selection in zip(parts, self.layer.selections, strict=True):
            part.selection = selection
        self._done()
        return parts

    def attend(self, q: Tensor, scale: float, forward: Forward) -> Tensor | None:
        """Write it and attend, q ``[B, H, 1, D]``, in one call: ``[B, 1, H, D]``; None where the kernel does not."""
        step = self.layer.step
        log = forward.log
        read = self._choose(q, scale, forward) if self.layer.plan.selecting(forward.rows) else ()
        self.layer.whole = False
        out = step.run(q, self.k, self.v, self.places, scale)
        if out is not None:
            self._done()
            log.used.add(step.NAME)
            for counted in read:
                log.decode.add(*counted)
        return out

    def _choose(self, q: Tensor, scale: float, forward: Forward) -> list[tuple]:
        """Choose what the token reads of each place, by the tokens before it; what `DecodeCounts.add` needs."""
        read = []
        plan = self.layer.plan
        group = q.shape[1] // plan.kv_heads
        for at, (role, place) in enumerate(zip(plan.filled, self.places, strict=True)):
            if not role.selecting(forward.rows):
                continue
            segment, length = place.segment, place.length
            if not role.decode.runs(length):
                continue
            cached = [Segment(segment.k[:, :, : length - 1], segment.v[:, :, : length - 1], length - 1)]
            own = role.heads.take(q, group)
            rows = slice(0, 1) if role.decode.by_sequence else slice(None)  # as where it is read query by query
            chosen, reused = self.layer.selections[at].choose(rows, own, cached, length - 1, scale)
            read.append((*chosen.counted(length - 1), reused))
            if chosen.note is not None:
                forward.log.notes.add(chosen.note)
            self.places[at] = place._replace(listed=chosen.listed)
        return read

    def _done(self) -> None:
        for segment, _, length, *_ in self.places:
            segment.length = length
        self.layer.seen = self.total
        self.layer.whole = True


class InPlaceOfKeys:
    """What a cache of ours gives an attention module as keys and as values: no tensor, which others could read."""

    @property
    def shape(self) -> None:
        """What any other attention function asks a key for first."""
        raise UnsupportedModeError(_wrapped() or NOT_OURS)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None) -> None:
        """An attention function that asks for no shape (Transformers 5.0) goes straight to torch: the same error."""
        given = (*args, *(kwargs or {}).values())
        return next(one.shape for one in given if isinstance(one, cls))


class LayerKV(InPlaceOfKeys):
    """What one layer's cache hands to the attention function.

    Attributes:
        pending: what is still to be written; asking for `parts` writes it.
    """

    def __init__(self, parts: list[HeadKV] | None, forward: Forward, pending: Pending | None = None):
        self._parts = parts
        self.forward = forward
        self.pending = pending

    @property
    def parts(self) -> list[HeadKV]:
        """One per role that has heads."""
        if self._parts is None:
            self._parts, self.pending = self.pending.write(), None
        return self._parts


def _wrapped() -> str | None:
    """What is said where another library put a function of its own in front of ours."""
    function = dict(ALL_ATTENTION_FUNCTIONS).get(NAME)
    owner = getattr(function, "__module__", "")
    if function is None or owner.partition(".")[0] == __name__.partition(".")[0]:
        return None
    return (
        f"the attention function '{NAME}' was wrapped by {owner}, which asks for keys as one tensor; those of a "
        "LongCtxCache are none. Import that library before patch_model (kvpress wraps all functions as it is imported)."
    )
