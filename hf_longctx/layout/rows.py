"""The geometry of one forward, as plain Python numbers: where each sequence of the batch starts, what is new.

Made once per forward by the base model's pre-hook and handed to every layer, so that no layer has to read a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from . import mask_errors

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """The rows of one forward. A slot is a column of the batch, pads included; a position counts a row's real tokens.

    Attributes:
        batch: number of rows.
        past: slots seen before this forward.
        new: slots this forward brings (``T``).
        starts: slot of each row's first real token, or None where every row starts at slot 0. A row that has
            shown nothing but pads so far is open: its start is ``past + new``.
        ends: slot after each row's last real token, or None where no row ends in pads.
    """

    batch: int
    past: int
    new: int
    starts: tuple[int, ...] | None = None
    ends: tuple[int, ...] | None = None
    _memo: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def total(self) -> int:
        """Slots seen, this forward included."""
        return self.past + self.new

    @property
    def padded(self) -> bool:
        return self.starts is not None

    def groups(self, by_end: bool = False) -> Iterator[tuple[slice, int]]:
        """(rows, start) of every set of rows that can be computed in one call; ``by_end``: that also end together."""
        if self.starts is None and not (by_end and self.ends is not None):
            yield slice(None), 0
        else:
            for row, start in enumerate(self.starts or (0,) * self.batch):
                yield slice(row, row + 1), start

    def start(self, row: int) -> int:
        """Padded position of a row's first real token."""
        return 0 if self.starts is None else self.starts[row]

    def real(self, row: int) -> tuple[int, int]:
        """Real tokens of a row that this forward brings, and that were seen so far, this forward included."""
        start = self.start(row)
        end = self.total if self.ends is None else self.ends[row]
        return max(0, end - max(start, self.past)), max(0, end - start)

    def positions(self, device: torch.device) -> Tensor:
        """Row positions of the new slots, int64 ``[B, T]``; 0 for left pads."""
        starts = torch.tensor(self.starts or (0,) * self.batch, device=device)[:, None]
        return (torch.arange(self.past, self.total, device=device) - starts).clamp_(min=0)

    def without_last(self, count: int) -> Rows:
        """The rows if this forward had not brought its last ``count`` slots."""
        if not count:
            return self
        shorter = {"new": self.new - count, "ends": None, "_memo": {}}
        return self.memo(("without_last", count), lambda: replace(self, **shorter))

    def memo(self, key: tuple, make: Callable[[], T]) -> T:
        """What all layers of this forward share, made once: mostly a tensor."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def ints(self, values: list[int], device: torch.device) -> Tensor:
        """``values`` as an int64 tensor on ``device``, copied there once per forward."""
        return self.memo(("ints", tuple(values), device), lambda: torch.tensor(values, device=device))

    def pad_bias(self, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """Score bias ``[B, 1, 1, total]`` that hides each row's left pads from one query; None without pads."""
        if self.starts is None:
            return None

        def make() -> Tensor:
            starts = torch.tensor(self.starts, device=device)[:, None, None, None]
            slots = torch.arange(self.total, device=device)
            return torch.zeros(self.batch, 1, 1, self.total, dtype=dtype, device=device).masked_fill_(
                slots < starts, float("-inf")
            )

        return self.memo(("pad_bias", device, dtype), make)

    def tail_bias(self, end: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Score bias ``[B, 1, 1, N]`` that hides the last ``min(start, end)`` of ``end`` slots, for the last N of them.

        N is the most that it hides of a row.
        """

        def make() -> Tensor:
            hidden = torch.tensor([min(start, end) for start in self.starts], device=device)[:, None, None, None]
            most = min(end, max(self.starts))
            left = torch.arange(most, 0, -1, device=device)  # slots to the end, the own one included
            zeros = torch.zeros(self.batch, 1, 1, most, dtype=dtype, device=device)
            return zeros.masked_fill_(left <= hidden, float("-inf"))

        return self.memo(("tail_bias", end, device, dtype), make)


def read_mask(
    mask: Tensor | None,
    batch: int,
    past: int,
    new: int,
    *,
    ids: Tensor | None = None,
    known: Callable[[], mask_errors.Known] = mask_errors.Known,
) -> Rows:
    """Rows from a 2D attention mask ``[B, past + new]`` (1 = real token), with one read of the device.

    Args:
        ids: the new tokens ``[B, T]``, where they are known, for what a message says.
        known: gives what is known of the model, for the same; asked where the mask is refused.

    Raises:
        UnsupportedModeError: a mask of another shape, or with holes between real tokens.
    """
    if mask is None:
        return Rows(batch, past, new)
    total = past + new
    if tuple(mask.shape) != (batch, total):
        raise mask_errors.wrong_shape(mask, batch, past, new, known())
    real = mask.bool()
    slots = torch.arange(total, device=mask.device)
    first = torch.where(real, slots, total).amin(-1)
    last = torch.where(real, slots, -1).amax(-1)
    counts = real.sum(-1)
    starts, ends, counts = torch.stack([first, last, counts]).tolist()
    for row, (start, end, count) in enumerate(zip(starts, ends, counts, strict=True)):
        if count and count != end - start + 1:
            raise mask_errors.holes(real, ids, row, known())
    ends = tuple(end + 1 if count else total for end, count in zip(ends, counts, strict=True))
    right_padded = any(end < total for end in ends)
    return Rows(batch, past, new, tuple(starts) if any(starts) else None, ends if right_padded else None)
