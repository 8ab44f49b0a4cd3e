"""The one interface between caches and kernels: what a role's KV heads keep, as segments, and which blocks are read.

Shapes: ``B`` batch, ``n`` KV heads of one role, ``G`` query heads per KV head, ``T`` tokens of this forward, ``S``
tokens kept, ``D`` head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .heads import RoleHeads

if TYPE_CHECKING:
    from .ragged import Ragged


@dataclass
class Segment:
    """Keys and values of consecutive kept tokens. Growing buffers, rings, pages and shared prefixes are all segments.

    Attributes:
        k: keys ``[B, n, capacity, D]``; slots from ``length`` on are uninitialised memory.
        v: values ``[B, n, capacity, D_v]``.
        length: tokens kept, in every row (int) or row by row (int64 ``[B]``).
        bias: added to the scores of these keys before the softmax, broadcastable to ``[B, n, 1, length]``.
        shared: nobody writes to the memory any more, and other caches may read it.
        bias_of_pads: the bias hides what is not a sequence's own, and does nothing else: the sequence alone has none.
    """

    saved_as: ClassVar[str] = "Segment"  # its word in a cache's file

    k: Tensor
    v: Tensor
    length: int | Tensor
    bias: Tensor | None = None
    shared: bool = False
    bias_of_pads: bool = False

    @property
    def longest(self) -> int:
        """Slots that a reader must look at: ``length``, or the whole capacity where rows differ."""
        return self.length if isinstance(self.length, int) else self.k.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor it keeps alive."""
        yield from (self.k, self.v)
        if isinstance(self.length, Tensor):
            yield self.length

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or select the rows: ``change`` does it to a tensor ``[B, ...]``.

        Sequences that share one copy of a prompt keep sharing it.
        """
        own = repeats(self.k, change) if self.shared and one_row(self.k) else change
        self.k, self.v = own(self.k), own(self.v)
        if isinstance(self.length, Tensor):
            self.length = change(self.length)

    def copy(self) -> Segment:
        """One with the same tokens and memory of its own, unless that is shared."""
        if self.shared:
            return replace(self)
        length = self.length.clone() if isinstance(self.length, Tensor) else self.length
        return replace(self, k=self.k.clone(), v=self.v.clone(), length=length)

    def contents(self) -> tuple[Tensor, Tensor]:
        """Views of the filled slots: k, v ``[B, n, longest, D]``."""
        return self.k[:, :, : self.longest], self.v[:, :, : self.longest]

    def saved(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """What `restored` needs, tensors (views of the filled slots) and plain numbers."""
        numbers = {"rows": self.k.shape[0], "capacity": self.k.shape[2], "shared": int(self.shared)}
        tensors = dict(zip(("k", "v"), self.contents(), strict=True))
        if self.k.stride(0) == 0:  # rows that share their memory are kept once
            tensors = {name: tensor[:1] for name, tensor in tensors.items()}
        if self.bias is not None:
            tensors["bias"] = self.bias
        if isinstance(self.length, int):
            return tensors, {**numbers, "length": self.length}
        return {**tensors, "length": self.length}, numbers

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, int], device: torch.device) -> Segment:
        """The segment of which `saved` gave ``tensors`` (views of a file, which are copied) and ``numbers``."""
        both = []
        for name in ("k", "v"):
            kept = tensors[name]
            room = kept.new_empty(*kept.shape[:2], numbers["capacity"], kept.shape[3], device=device)
            room[:, :, : kept.shape[2]] = kept
            both.append(room.expand(numbers["rows"], -1, -1, -1) if kept.shape[0] < numbers["rows"] else room)
        copies = {name: tensors[name].to(device, copy=True) for name in ("length", "bias") if name in tensors}
        return cls(*both, copies.get("length", numbers.get("length")), copies.get("bias"), bool(numbers["shared"]))

    def frozen(self, tokens: int, spare: float) -> Segment:
        """Its first ``tokens`` as a shared segment: the same memory, or a copy that fits.

        The copy where the memory beside them, which they would keep alive, is more than ``spare`` times theirs.
        """
        rows = slice(0, 1) if one_row(self.k) else slice(None)
        pair = [fitting(x[rows, :, :tokens], spare) for x in (self.k, self.v)]
        return Segment(*(x.expand(self.k.shape[0], -1, -1, -1) for x in pair), tokens, shared=True)


def one_row(x: Tensor) -> bool:
    """Whether all rows of ``x [B, ...]`` are one and the same memory."""
    return x.shape[0] == 1 or x.stride(0) == 0


def repeats(x: Tensor, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``change`` does to rows that are all one memory, as those of ``x [B, ...]``: as many of it as come out."""
    batch = change(x[:, :0, :0]).shape[0]
    return lambda x: x[:1].expand(batch, *x.shape[1:])


def fitting(x: Tensor, spare: float) -> Tensor:
    """x, or a copy where the memory beside it, which it would keep alive, is more than ``spare`` times its own."""
    if x.untyped_storage().nbytes() <= (1 + spare) * x.nbytes:
        return x
    with torch.inference_mode(False):  # to be read outside of inference mode
        return x.clone(memory_format=torch.contiguous_format)


class Listed(NamedTuple):
    """Entries of ``size`` slots that a token reads of a segment: the first ``low``, listed ones, all from ``high`` on.

    Attributes:
        entries: int32 ``[B, n, M]``, contiguous, ascending, between ``low`` and ``high``.
        counts: how many of them, int32 ``[B, n]``, contiguous; None: M.
    """

    size: int
    low: int
    high: int
    entries: Tensor
    counts: Tensor | None = None


class Place(NamedTuple):
    """Where the next token of every sequence goes, and what it reads afterwards: the first slots of one segment.

    Attributes:
        segment: of one length for all sequences, without a bias.
        slot: which one the token takes.
        length: how many slots it reads, its own among them.
        listed: of these slots it reads the listed ones; None: all.
        before: what it reads before these slots; None: nothing.
    """

    segment: Segment
    slot: int
    length: int
    listed: Listed | None = None
    before: Ragged | None = None


@dataclass
class HeadKV:
    """What the KV heads of one role offer the queries of this forward.

    Attributes:
        heads: which heads these are.
        segments: in decode (one query token) every key of every segment is visible, but for slots past a row's
            length. With several query tokens the queries are the last ``T`` tokens of the last segment.
        sinks: with several query tokens, for stores with a gap after the first tokens: the segment of those first
            tokens of each row, which ``segments`` then leaves out.
        first: row position of the first key of ``segments[0]`` (0 when nothing was dropped or held in ``sinks``).
        spec: the spec of the store, which knows its visibility rule.
        state: what else the spec's `reads` needs, tensors by name.
        selection: which of these tokens a decoded token reads; None: all.
        attended: called after attention with the queries, this, the rows and the scores (`Store.attended`); None: it
            is not.
    """

    heads: RoleHeads
    segments: list[Segment]
    spec: object
    sinks: Segment | None = None
    first: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)
    selection: Any = None
    attended: Callable[..., None] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.segments[0].dtype

    @property
    def uneven(self) -> bool:
        """Whether its heads have different numbers of a sequence's tokens."""
        return False

    def gone(self, row: int) -> int:
        """Tokens of a sequence that are not cached any more, in any of its heads; 0 where those are `uneven`."""
        return 0

    def without_last(self, count: int) -> HeadKV:
        """The same if this forward had not brought its last ``count`` tokens, which lie in the last segment."""
        if not count:
            return self
        own = self.segments[-1]
        end = own.length - count
        return replace(self, segments=[*self.segments[:-1], Segment(own.k[:, :, :end], own.v[:, :, :end], end)])

    def begun(self, rows: slice, start: int) -> list[Segment]:
        """All tokens of ``rows`` that began at slot ``start``, in this forward: they lie in the last segment."""
        own = self.segments[-1]
        k, v = (x[rows, :, start - self.first : own.length] for x in (own.k, own.v))
        return [Segment(k, v, k.shape[2])]

    def alone(self, rows: slice, start: int) -> list[Segment]:
        """The segments of ``rows``, which all start at slot ``start``, as if those rows were alone: without pads."""
        left = []
        for segment in self.segments:
            cut = min(start, segment.length)
            start -= cut
            if cut < segment.length:
                bias = None if segment.bias_of_pads else segment.bias
                if bias is not None:
                    bias = (bias if bias.shape[0] == 1 else bias[rows])[..., cut:]
                k = segment.k[rows, :, cut : segment.length]
                v = segment.v[rows, :, cut : segment.length]
                left.append(Segment(k, v, segment.length - cut, bias))
        return left


def copied(k: Tensor, v: Tensor, at: Tensor, hidden: Tensor, bias: Tensor) -> Segment:
    """The rows ``at [B, n, S]`` of flat k, v ``[N, D]`` as a plain segment, in which a bias hides what is no token.

    Args:
        hidden: bool, broadcastable to ``at``: what stands there may be another sequence's, and NaN.
        bias: added to the scores, of the shape of ``hidden``.
    """
    k, v = (x[at].masked_fill_(hidden[..., None], 0) for x in (k, v))
    return Segment(k, v, at.shape[2], bias.masked_fill(hidden, float("-inf"))[:, :, None])


def joined(segments: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """k, v ``[B, n, S, D]`` of all segments, streamed ones too: views of a single plain one, else copies."""
    if len(segments) == 1:
        return segments[0].contents()
    keys, values = zip(*(segment.contents() for segment in segments), strict=True)
    return torch.cat(keys, 2), torch.cat(values, 2)
