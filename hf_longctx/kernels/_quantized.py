"""Keys and values packed to 8 or 4 bits: keys per channel in groups of tokens, values per token.

KIVI, arXiv:2402.02750.

A number x of a group is kept as the whole number ``code``, 0 to 2 ** bits - 1, and read as ``least + code * step``.
``least`` is the smallest number of the group, exactly, and ``step`` is rounded up, so what is read is at most half a
step from x, but for the rounding of the dtype. A group whose numbers or largest difference are not finite reads as NaN.

Shapes: ``B`` batch, ``n`` KV heads, ``S`` token slots, ``D`` head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..layout.reads import All, Causal
from ..layout.segments import Segment
from ..layout.streamed import Stored

if TYPE_CHECKING:
    from .base import Case

BLOCK = 1 << 20  # numbers of a block of unpacked keys, at most, but for a single group of tokens
PACKED = "packed"  # first of a `kind`
TENSORS = ("k", "k_scale", "v", "v_scale")
PREFILL_NOTE = "sparse prefill: what a quantized store kept was unpacked as a whole, layer by layer, to choose from it"


@dataclass
class Quantised(Stored):
    """Consecutive tokens of every row. A slot is a row position less ``first``, so left pads take none.

    Attributes:
        k: codes of the keys, uint8 ``[B, n, S, D * bits / 8]``; of 4 bits, a byte's low half is channel i, its high
            half channel i + D / 2.
        k_scale: step and least number of each group and channel, ``[B, n, S / group, 2, D]``.
        v: codes of the values, as ``k``.
        v_scale: step and least number of each token, ``[B, n, S, 2]``.
        bits, group: of a code, and tokens that share a step of the keys.
        first: row position of the first slot.
        whole: slots that every row has filled, at least.
        shared: nobody writes to the memory any more, and other caches may read it.
        lengths: what a reader sees: slots filled, in every row (one number) or row by row.
        by_row: ``lengths`` as int64 ``[B]`` on the device of ``k``; needed where they differ.
        room: slots to have again after saving and loading; 0: as many as now.
    """

    saved_as: ClassVar[str] = "Packed"

    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor
    bits: int
    group: int
    first: int = 0
    whole: int = 0
    shared: bool = False
    lengths: tuple[int, ...] = (0,)
    by_row: Tensor | None = None
    room: int = 0

    @classmethod
    def empty(cls, k: Tensor, v: Tensor, heads: int, slots: int, bits: int, group: int, first: int) -> Quantised:
        """Room for ``slots`` tokens of ``heads`` heads, like ``k`` and ``v`` in batch, head_dim, dtype and device."""
        shapes = cls.shapes((k.shape[0], heads), k.shape[3], v.shape[3], slots, bits, group, k.dtype)
        with torch.inference_mode(False):  # so that the cache can be continued outside of inference mode
            return cls(*(k.new_empty(shape, dtype=dtype) for dtype, shape in shapes.values()), bits, group, first)

    @staticmethod
    def shapes(
        rows: tuple[int, int], k_dim: int, v_dim: int, slots: int, bits: int, group: int, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor; ``rows``: B and n."""
        return {
            "k": (torch.uint8, (*rows, slots, k_dim * bits // 8)),
            "k_scale": (dtype, (*rows, slots // group, 2, k_dim)),
            "v": (torch.uint8, (*rows, slots, v_dim * bits // 8)),
            "v_scale": (dtype, (*rows, slots, 2)),
        }

    @property
    def kind(self) -> Hashable:
        """Bits of a code, and head_dim of the values."""
        return PACKED, self.bits, self.v.shape[3] * 8 // self.bits

    @property
    def joined_note(self) -> str:
        return PREFILL_NOTE

    @property
    def slots(self) -> int:
        return self.k.shape[2]

    @property
    def end(self) -> int:
        """Row position after the last slot."""
        return self.first + self.slots

    @property
    def dtype(self) -> torch.dtype:
        return self.k_scale.dtype

    @property
    def longest(self) -> int:
        """Slots that a reader must look at."""
        return max(self.lengths)

    @property
    def form(self) -> tuple[int, int, int]:
        return *self.k.shape[:2], self.k_scale.shape[4]

    def length(self, low: int, high: int) -> int | Tensor:
        """How many of the slots ``low .. high`` are filled, in every row or row by row (int64 ``[B]``)."""
        found = [min(max(0, length - low), high - low) for length in self.lengths]
        return found[0] if min(found) == max(found) else self.by_row.clamp(low, high) - low

    def write(self, rows: slice, slot: int, k: Tensor, v: Tensor) -> None:
        """Pack k, v ``[b, n, N, D]`` of the rows ``rows`` into the slots from ``slot`` on, whole groups of them."""
        into = slice(slot, slot + k.shape[2])
        groups = slice(into.start // self.group, into.stop // self.group)
        codes, scale = quantise(k.unflatten(2, (-1, self.group)), 3, self.bits)
        self.k[rows, :, into], self.k_scale[rows, :, groups] = codes.flatten(2, 3), torch.cat(scale, 3)
        codes, scale = quantise(v, 3, self.bits)
        self.v[rows, :, into], self.v_scale[rows, :, into] = codes, torch.cat(scale, 3)

    def unpack(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """k, v ``[B, n, high - low, D]`` of these slots, in the dtype they were kept in."""
        start = low // self.group * self.group
        stop = -(-high // self.group) * self.group
        room = _Room(self, stop - start)
        return tuple(x[:, :, low - start : high - start] for x in room.fill(self, start, stop))

    span = unpack

    def take(self, slots: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(self.dtype, torch.float32)
        found = []
        scales = (self.k_scale.flatten(3), slots // self.group), (self.v_scale, slots)
        for codes, (scale, at) in zip((self.k, self.v), scales, strict=True):
            few, own = (
                x.gather(2, where[..., None].expand(-1, -1, -1, x.shape[3]))
                for x, where in ((codes, slots), (scale, at))
            )
            step, least = own.unflatten(3, (2, -1)).to(wide).unbind(3)
            into = few.new_empty(*few.shape[:3], few.shape[3] * 8 // self.bits, dtype=wide)
            _codes(few, self.bits, into)
            found.append(into.mul_(step).add_(least).to(self.dtype))
        return tuple(found)

    def blocks(self) -> Iterator[Segment]:
        batch, heads, _, _ = self.k.shape
        tokens = BLOCK // max(1, batch * heads * self.k_scale.shape[4]) // self.group * self.group
        tokens = min(max(self.group, tokens), self.longest)
        room = _Room(self, tokens)
        for low in range(0, self.longest, tokens or 1):
            high = min(low + tokens, self.longest)
            yield Segment(*room.fill(self, low, high), self.length(low, high))

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.k, self.k_scale, self.v, self.v_scale)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """As `Segment.map_rows`: rows that share their memory for good go on sharing it."""
        if self.shared and (self.k.shape[0] == 1 or self.k.stride(0) == 0):
            batch = change(self.k[:, :0, :0]).shape[0]
            self._set(x[:1].expand(batch, *x.shape[1:]) for x in self.tensors())
        else:
            self._set([change(x) for x in self.tensors()])

    def copy(self) -> Quantised:
        return replace(self) if self.shared else self._with(x.clone() for x in self.tensors())

    def __getstate__(self) -> dict:
        """Of copies and pickles. A pickle has all the memory behind a tensor: after a fork, that of several pieces."""
        return {**self.__dict__, "by_row": None} | {name: _alone(getattr(self, name)) for name in TENSORS}

    def blanked(self, held: list[tuple[slice, int]]) -> Quantised:
        """Without the slots that no row fills; those that one row does not are zeros. ``held`` are (rows, slots)."""
        most = max(count for _, count in held)
        other = replace(self.cut(0, most, self.shared), room=self.slots)
        if any(count < most for _, count in held):
            other = other._with(x.clone() for x in other.tensors())
            for rows, count in held:
                for x in other.cut(count, most).tensors():
                    x[rows] = 0
        return other

    def saved(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        rows = slice(0, 1) if self.k.stride(0) == 0 else slice(None)  # rows that share their memory are kept once
        tensors = {name: getattr(self, name)[rows] for name in TENSORS}
        numbers = {name: int(getattr(self, name)) for name in ("bits", "group", "first", "whole", "shared")}
        return tensors, {**numbers, "rows": self.k.shape[0], "slots": self.room or self.slots}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, int], device: torch.device) -> Quantised:
        slots = numbers["slots"]
        group = numbers["group"]
        made = []
        for name in TENSORS:
            x = tensors[name]
            room = x.new_empty(
                *x.shape[:2], slots // group if name == "k_scale" else slots, *x.shape[3:], device=device
            )
            room[:, :, : x.shape[2]] = x
            made.append(room.expand(numbers["rows"], *room.shape[1:]) if x.shape[0] < numbers["rows"] else room)
        plain = {name: numbers[name] for name in ("bits", "group", "first", "whole")}
        return cls(*made, **plain, shared=bool(numbers["shared"]))

    def cut(self, low: int, high: int, shared: bool = False) -> Quantised:
        """The slots ``low .. high``, multiples of ``group``, in the same memory."""
        groups = slice(low // self.group, high // self.group)
        ours = (slice(low, high), groups, slice(low, high), slice(low, high))
        other = self._with(x[:, :, part] for x, part in zip(self.tensors(), ours, strict=True))
        other.first = self.first + low
        other.shared = shared
        other.whole = min(max(0, self.whole - low), high - low)
        return other

    def copy_from(self, other: Quantised) -> None:
        """The tokens that both have room for."""
        low = max(self.first, other.first)
        high = min(self.end, other.end)
        if low < high:
            ours, theirs = (one.cut(low - one.first, high - one.first) for one in (self, other))
            for into, x in zip(ours.tensors(), theirs.tensors(), strict=True):
                into.copy_(x)

    def seen(self, counts: Sequence[int], ints: Callable[[list[int], torch.device], Tensor]) -> Quantised:
        """For a reader of the first ``counts`` tokens of each row (one number for all of them).

        ``ints`` makes a tensor on a device, and is asked where rows differ.
        """
        lengths = [min(max(0, count - self.first), self.slots) for count in counts]
        by_row = ints(lengths, self.k.device) if min(lengths) < max(lengths) else None
        return replace(self, lengths=tuple(lengths), by_row=by_row)

    def alone(self, rows: slice, count: int) -> Quantised:
        """For a reader of the first ``count`` tokens of the rows ``rows``."""
        other = self._with(x[rows] for x in self.tensors())
        other.lengths = (min(max(0, count - self.first), self.slots),)
        other.by_row = None
        return other

    def _with(self, tensors) -> Quantised:
        return replace(self, **dict(zip(TENSORS, tensors, strict=True)))

    def _set(self, tensors) -> None:
        self.k, self.k_scale, self.v, self.v_scale = tensors


def _alone(x: Tensor) -> Tensor:
    """x, or a copy of it where others have a part of its memory; rows that share theirs go on sharing it."""
    one = x[:1] if x.stride(0) == 0 else x
    if one.untyped_storage().nbytes() == one.nbytes:
        return x
    with torch.inference_mode(False):  # as in `Quantised.empty`
        return one.clone(memory_format=torch.contiguous_format).expand(x.shape)


def packed_reason(case: Case, lanes: int = 1) -> str | None:
    """Why a kernel does not read the segments of a case that are not plain; None: it unpacks them for one query.

    ``lanes``: what a head_dim must be a multiple of, at 8 bits; at 4 bits twice that.
    """
    if len(case.kinds) > 1 or not all(isinstance(kind, tuple) and kind[0] == PACKED for kind in case.kinds):
        return "reads plain segments and packed ones of one kind alone"
    if not case.one_query or case.reads not in (All, Causal):
        return "reads packed segments with one query over all of them alone"
    ((_, bits, dim),) = case.kinds
    if dim != case.head_dim or dim % (lanes * 8 // bits):
        return f"takes no packed values of {bits} bits and head_dim {dim} with queries of {case.head_dim}"
    return None


class _Room:
    """Memory for ``slots`` unpacked keys and values, used again for every block."""

    def __init__(self, packed: Quantised, slots: int):
        wide = torch.promote_types(packed.dtype, torch.float32)  # in a lower one 255 steps could not be told apart
        dims = (packed.k_scale.shape[4], packed.v.shape[3] * 8 // packed.bits)
        shape = (*packed.k.shape[:2], slots)
        like = packed.k_scale
        self.wide = [like.new_empty(*shape, dim, dtype=wide) for dim in dims]
        self.plain = self.wide if wide == packed.dtype else [like.new_empty(*shape, dim) for dim in dims]

    def fill(self, packed: Quantised, low: int, high: int) -> tuple[Tensor, Tensor]:
        """k, v ``[B, n, high - low, D]`` of these slots, until it is called again; whole groups of them."""
        scale = packed.k_scale[:, :, low // packed.group : high // packed.group]
        k, v = (x[:, :, : high - low] for x in self.wide)
        for wide, codes in ((k, packed.k), (v, packed.v)):
            _codes(codes[:, :, low:high], packed.bits, wide)
        grouped = k.unflatten(2, (-1, packed.group))
        grouped.mul_(scale[:, :, :, :1]).add_(scale[:, :, :, 1:])
        v.mul_(packed.v_scale[:, :, low:high, :1]).add_(packed.v_scale[:, :, low:high, 1:])
        if self.plain is self.wide:
            return k, v
        return tuple(into[:, :, : high - low].copy_(x) for into, x in zip(self.plain, (k, v), strict=True))


def quantise(x: Tensor, dim: int, bits: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Codes of ``x`` as `Quantised` has them; step and least value along ``dim`` (of size 1), in the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    levels = 2**bits - 1
    least = wide.amin(dim, keepdim=True)
    most = wide.amax(dim, keepdim=True)
    step = _upwards((most - least) / levels, x.dtype)
    codes = ((wide - least) / step.to(wide.dtype)).round_().nan_to_num_(0).clamp_(0, levels).to(torch.uint8)
    if bits == 4:
        low, high = codes.chunk(2, -1)
        codes = low | high << 4
    return codes, (step, least.to(x.dtype))


def _upwards(step: Tensor, dtype: torch.dtype) -> Tensor:
    """``step``, itself off by a rounding, in ``dtype`` and not less than it was; 0 stays 0, infinity becomes NaN."""
    for kind in dict.fromkeys((step.dtype, dtype)):
        info = torch.finfo(kind)
        rounded = step.to(kind)
        more = (rounded.to(step.dtype) * (1 + info.eps) + info.smallest_normal * info.eps).to(kind)
        low = rounded < step if kind != step.dtype else step > 0
        step = torch.where(low, more, rounded)
    return step.masked_fill(~step.isfinite(), float("nan"))


def _codes(codes: Tensor, bits: int, into: Tensor) -> None:
    """``codes [..., D * bits / 8]`` as numbers ``into [..., D]``."""
    if bits == 8:
        into.copy_(codes)
        return
    low, high = into.chunk(2, -1)
    low.copy_(codes & 15)
    high.copy_(codes >> 4)
