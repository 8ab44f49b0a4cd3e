"""Keys and values of heads that keep different numbers of tokens: what an eviction leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import UnsupportedModeError
from .segments import Segment, copied
from .streamed import Stored

BLOCK = 4096  # tokens of each KV head in a block that kernels get which read plain segments alone
KIND = "ragged"  # what `Streamed.kind` says of it


@dataclass
class Ragged(Stored):
    """The tokens of each sequence and KV head one after the other, in one flat buffer to which nobody writes.

        sequence 0: head 0 keeps 3 tokens, head 1 keeps 1        sequence 1: head 0 keeps 2 tokens, head 1 keeps 4

        k, v       | a a a | b | c c | d d d d |         each part ascending by position
        starts       0       3   4     6                 [[0, 3], [4, 6]]
        lengths                                          [[3, 1], [2, 4]]

    Sequences may share a part: a batch of forks of one prompt has it once.

    Attributes:
        k, v: ``[N, D]`` and ``[N, D_v]``.
        positions: row positions of the tokens, int32 ``[N]``.
        starts, lengths: where the part of a sequence's KV head begins, and its tokens: int64 ``[B, n]``, contiguous, in
            host memory.
        score_bias: added to the scores of a token, float32 ``[N]``; None: nothing.
    """

    saved_as: ClassVar[str] = "Ragged"
    kind: ClassVar[str] = KIND
    joined_note: ClassVar[str] = ""  # heads of different lengths are never joined

    k: Tensor
    v: Tensor
    positions: Tensor
    starts: Tensor
    lengths: Tensor
    score_bias: Tensor | None = None
    _bounds: list[list[list[int]]] | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, parts: Sequence[Sequence[tuple[Tensor, ...]]]) -> Ragged:
        """One from the parts of each sequence's KV heads: (k ``[S, D]``, v, positions), or with a bias ``[S]`` too."""
        flat = [part for heads in parts for part in heads]
        lengths = torch.tensor([[len(part[0]) for part in heads] for heads in parts], dtype=torch.int64)
        with torch.inference_mode(False):  # so that the cache can be continued outside of inference mode
            k, v, positions, *bias = (torch.cat(tensors) for tensors in zip(*flat, strict=True))
        starts = (lengths.flatten().cumsum(0) - lengths.flatten()).view_as(lengths)
        return cls(k, v, positions.to(torch.int32), starts, lengths, *bias)

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    @property
    def longest(self) -> int:
        return max((length for heads in self.bounds for _, length in heads), default=0)

    @property
    def bounds(self) -> list[list[list[int]]]:
        """Start and length of each sequence's KV heads, as plain numbers."""
        if self._bounds is None:
            self._bounds = torch.stack([self.starts, self.lengths], -1).tolist()
        return self._bounds

    @property
    def form(self) -> tuple[int, int, int]:
        return (*self.lengths.shape, self.k.shape[1])

    def of_head(self, row: int, head: int) -> slice:
        """Where the tokens of a sequence's KV head lie in the flat buffer."""
        start, length = self.bounds[row][head]
        return slice(start, start + length)

    def head(self, row: int, head: int) -> Segment:
        """The tokens of one sequence's KV head, ``[1, 1, S, D]``: a view."""
        own = self.of_head(row, head)
        bias = None if self.score_bias is None else self.score_bias[own][None, None, None]
        return Segment(self.k[own][None, None], self.v[own][None, None], own.stop - own.start, bias)

    def alone(self, rows: slice) -> Ragged:
        """That of these sequences."""
        starts, lengths = (x[rows].contiguous() for x in (self.starts, self.lengths))
        other = replace(self, starts=starts, lengths=lengths)
        other._bounds = self.bounds[rows]
        return other

    def first_apart(self) -> tuple[Segment, Ragged]:
        """Each sequence's first token, copied, hidden from a head that has it no more; and the rest: views."""
        held = self.lengths > 0
        if len(self.positions):
            at = self.starts.clamp(max=len(self.positions) - 1)
            held &= self.positions[at.to(self.k.device)].to("cpu") == 0
        taken = held.long()
        rest = replace(self, starts=self.starts + taken, lengths=self.lengths - taken)
        return self._padded(self.starts, taken, 0, 1), rest

    def blocks(self) -> Iterator[Segment]:
        """Copies as long as the longest head's, in which a bias of -inf hides what a shorter one has not."""
        for low in range(0, max(1, self.longest), BLOCK):
            yield self._padded(self.starts, self.lengths, low, min(low + BLOCK, self.longest))

    def contents(self) -> tuple[Tensor, Tensor]:
        """Never: what tells a head's tokens from what it has not is a bias.

        Raises:
            UnsupportedModeError: always.
        """
        raise UnsupportedModeError(
            "heads that keep different tokens have no keys and values of one shape, which a prefill pattern or a "
            "selection needs. Turn that off for these heads, or evict as many tokens of every head (by: uniform)."
        )

    def _padded(self, starts: Tensor, lengths: Tensor, low: int, high: int) -> Segment:
        """The tokens ``low .. high`` of each part, as a plain segment."""
        slots = torch.arange(low, high)
        hidden = slots >= lengths[..., None]
        at = (starts[..., None] + slots).masked_fill(hidden, 0).to(self.k.device)
        hidden = hidden.to(self.k.device)
        dtype = torch.promote_types(self.dtype, torch.float32)
        bias = torch.zeros(hidden.shape, dtype=dtype, device=self.k.device)
        if not len(self.positions):  # nothing to copy from
            k, v = (x.new_zeros(*hidden.shape, x.shape[1]) for x in (self.k, self.v))
            return Segment(k, v, high - low, bias.masked_fill(hidden, float("-inf"))[:, :, None])
        if self.score_bias is not None:
            bias += self.score_bias[at]
        return copied(self.k, self.v, at, hidden, bias)

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.k, self.v, self.positions, self.starts, self.lengths)
        if self.score_bias is not None:
            yield self.score_bias

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Sequences that come from one go on sharing its part; what no sequence has any more is given back."""
        self.starts, self.lengths = (change(x).contiguous() for x in (self.starts, self.lengths))
        self._bounds = None
        own = set(self._parts())
        if sum(length for _, length in own) < len(self.positions):
            self._pack(sorted(own))

    def _pack(self, parts: list[tuple[int, int]]) -> None:
        """Move these parts, (start, length), next to each other."""
        moved = {}
        end = 0
        for start, length in parts:
            moved[start, length] = end
            end += length
        none = torch.arange(0)
        at = torch.cat([none, *(torch.arange(start, start + length) for start, length in parts)]).to(self.k.device)
        with torch.inference_mode(False):
            self.k, self.v, self.positions = self.k[at], self.v[at], self.positions[at]
            self.score_bias = None if self.score_bias is None else self.score_bias[at]
        starts = [moved[pair] for pair in self._parts()]
        self.starts, self._bounds = torch.tensor(starts, dtype=torch.int64).view_as(self.lengths), None

    def _parts(self) -> Iterator[tuple[int, int]]:
        """(start, length) of every sequence's KV heads."""
        return ((start, length) for heads in self.bounds for start, length in heads)

    def copy(self) -> Ragged:
        return replace(self)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        tensors = {"k": self.k, "v": self.v, "positions": self.positions, "starts": self.starts}
        tensors["lengths"] = self.lengths
        return (tensors if self.score_bias is None else {**tensors, "score_bias": self.score_bias}), {}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, int], device: torch.device) -> Ragged:
        host = ("starts", "lengths")
        return cls(**{name: x.to("cpu" if name in host else device, copy=True) for name, x in tensors.items()})
