"""One decoded token of one layer by the native kernel: its keys are written and all its heads attend, in one call."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..layout.dtypes import needs_grad
from ..layout.heads import RoleHeads
from ..layout.segments import Listed, Place
from . import _native_ragged

# Where the numbers that change with every token stand in what the library is given (step in _native/decode.h).
THREADS, Q, OUT, K, V, PLACES = 5, 6, 10, 16, 20, 25


class LayerStep:
    """The call of one layer, laid out once: per token a few numbers of it change.

    Holds no tensor, so that a copy of its layer copies none.
    """

    def __init__(self, heads: Sequence[RoleHeads], load: Callable):
        self.heads = tuple(one.kv_heads for one in heads)
        self.load = load
        self.facts: tuple | None = None
        self.numbers = array("q")
        self.slots: list[tuple[int, int]] = []  # where each place's slot stands, and its capacity

    def run(self, q: Tensor, k: Tensor, v: Tensor, places: Sequence[Place], scale: float) -> Tensor | None:
        """See `kernels.base`.

        Raises:
            ValueError: a place outside of its segment; what a place reads before, where that does not fit together.
        """
        facts = (q.shape, q.stride(), k.stride(), v.stride(), q.dtype, *(_facts(place) for place in places))
        if facts != self.facts and not self._lay_out(facts, q, k, v, places):
            return None
        if needs_grad(q) or not takes_scale(scale):
            return None
        batch, heads, _, dim = q.shape
        out = q.new_empty(batch, 1, heads, dim)
        numbers = self.numbers
        numbers[THREADS] = torch.get_num_threads()
        numbers[Q], numbers[OUT], numbers[K], numbers[V] = q.data_ptr(), out.data_ptr(), k.data_ptr(), v.data_ptr()
        for (at, capacity), (_, slot, length, listed, _) in zip(self.slots, places, strict=True):
            if not (0 <= slot < length <= capacity):
                raise ValueError(f"slot {slot} and length {length} of a segment of {capacity} slots")
            numbers[at], numbers[at + 1] = slot, length
            numbers[at + 10] = 0
            if listed is not None:
                numbers[at + 10 : at + 16] = array("q", _listed(listed, length, batch))
        used = self.load().hf_longctx_step(q.dtype == torch.bfloat16, scale, 0, numbers.buffer_info()[0])
        if used == _native_ragged.OUTSIDE:
            raise ValueError(f"a decoded token was given {_native_ragged.WHY}")
        if used <= 0:
            raise MemoryError("kernel native: no memory for the temporaries of a decoded token")
        return out

    def _lay_out(self, facts: tuple, q: Tensor, k: Tensor, v: Tensor, places: Sequence[Place]) -> bool:
        """The numbers of this call; False where the library does not take these tensors."""
        batch, heads, tokens, dim = q.shape
        kv_heads = k.shape[1]
        buffers = [x for place in places for x in (place.segment.k, place.segment.v)]
        shapes = [(batch, len(own)) for own in self.heads for _ in range(2)]
        fit = all(x.shape[:2] == shape and x.shape[3] == dim for x, shape in zip(buffers, shapes, strict=True))
        befores = [
            (place.before, len(own)) for place, own in zip(places, self.heads, strict=True) if place.before is not None
        ]
        alike = all(x.dtype == q.dtype and x.device == q.device and x.stride(-1) == 1 for x in (q, k, v, *buffers))
        whole = k.shape == v.shape == (batch, kv_heads, 1, dim) and tokens == 1 and not heads % kv_heads
        alike = alike and all(_native_ragged.fits(before, q) for before, _ in befores)
        if not (fit and alike and whole and sorted(sum(self.heads, ())) == list(range(kv_heads))):
            return False
        for before, own in befores:
            if (why := _native_ragged.misfit(before, batch, own)) is not None:
                raise ValueError(f"a decoded token was given {why}")
        size = q.element_size()
        numbers = [batch, heads, kv_heads, 1, dim, 0, *heads_of(q), 0, size * heads * dim, size * dim, 0, 0, 0]
        numbers += [*heads_of(k), *heads_of(v), len(places)]
        self.slots = []
        for place, own in zip(places, self.heads, strict=True):
            self.slots.append((len(numbers), place.segment.k.shape[2]))
            before = _native_ragged.NONE if place.before is None else _native_ragged.numbers(place.before)
            buffers = (*heads_of(place.segment.k), *heads_of(place.segment.v))
            numbers += [0, 0, *buffers, *[0] * 6, *before, len(own), *own]
        self.numbers, self.facts = array("q", numbers), facts
        return True


def _listed(listed: Listed, length: int, batch: int) -> tuple[int, ...]:
    """Of a list as the library takes it; its entries were checked when they were chosen."""
    size, low, high, entries, counts = listed
    if not (0 <= low <= high <= length // size) or entries.dtype != torch.int32 or entries.shape[0] != batch:
        raise ValueError(f"entries {low} to {high} of {size} slots, {list(entries.shape)}, for a length of {length}")
    return size, low, high, entries.shape[2], entries.data_ptr(), 0 if counts is None else counts.data_ptr()


def takes_scale(scale: float) -> bool:
    """Whether the library multiplies scores by this; others it would take for scores of keys that are not there."""
    return 1e-30 < scale < 1e30


def _facts(place: Place) -> tuple:
    k, v = place.segment.k, place.segment.v
    facts = (k.data_ptr(), v.data_ptr(), k.shape[2])
    return facts if place.before is None else facts + _native_ragged.facts(place.before)


def heads_of(x: Tensor) -> tuple[int, int, int, int]:
    """``Heads`` of vectors.h: where ``x [B, heads, tokens, D]`` is, and its strides in bytes."""
    size = x.element_size()
    batch, head, token, _ = x.stride()
    return x.data_ptr(), size * batch, size * head, size * token
