"""What one forward knows about the rows of its batch, as plain Python numbers: where each row starts, what is new.

Set once per forward by the base model's pre-hook and handed to every layer, so that no layer has to read a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import UnsupportedModeError


@dataclass
class Rows:
    """The rows of one forward. A slot is a column of the batch, pads included; a position counts a row's real tokens.

    Attributes:
        batch: number of rows.
        past: slots seen before this forward.
        new: slots this forward brings (``T``).
        starts: slot of each row's first real token, or None where every row starts at slot 0. A row that has
            shown nothing but pads so far is open: its start is ``past + new``.
        ends: slot after each row's last real token, or None where no row ends in pads.
        observer: see ``hf_longctx.observe``.
        used: names of the kernels that ran in this forward, for the report.
    """

    batch: int
    past: int
    new: int
    starts: tuple[int, ...] | None = None
    ends: tuple[int, ...] | None = None
    observer: Callable | None = None
    used: set[str] = field(default_factory=set)
    _memo: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def total(self) -> int:
        """Slots seen, this forward included."""
        return self.past + self.new

    @property
    def padded(self) -> bool:
        return self.starts is not None

    def groups(self) -> Iterator[tuple[slice, int]]:
        """(rows, start) of every set of rows that can be computed in one call."""
        if self.starts is None:
            yield slice(None), 0
        else:
            for row, start in enumerate(self.starts):
                yield slice(row, row + 1), start

    def memo(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        """A tensor all layers of this forward share, made once."""
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


def read_mask(mask: Tensor | None, batch: int, past: int, new: int) -> Rows:
    """Rows from a 2D attention mask ``[B, past + new]`` (1 = real token), with one read of the device.

    Raises:
        UnsupportedModeError: a mask of another shape, or with holes between real tokens.
    """
    if mask is None:
        return Rows(batch, past, new)
    total = past + new
    if tuple(mask.shape) != (batch, total):
        raise UnsupportedModeError(
            f"attention_mask has shape {tuple(mask.shape)}, but this forward needs {(batch, total)}: one column for "
            f"each of the {past} cached and {new} new tokens. Pass the mask of the whole sequence."
        )
    real = mask.bool()
    slots = torch.arange(total, device=mask.device)
    first = torch.where(real, slots, total).amin(-1)
    last = torch.where(real, slots, -1).amax(-1)
    counts = real.sum(-1)
    starts, ends, counts = torch.stack([first, last, counts]).tolist()
    for row, (start, end, count) in enumerate(zip(starts, ends, counts, strict=True)):
        if count and count != end - start + 1:
            raise UnsupportedModeError(
                f"attention_mask has holes: row {row} has {count} real tokens between columns {start} and {end}. Real "
                "tokens must be consecutive: pad on the left for generation, on the right for training."
            )
    ends = tuple(end + 1 if count else total for end, count in zip(ends, counts, strict=True))
    right_padded = any(end < total for end in ends)
    return Rows(batch, past, new, tuple(starts) if any(starts) else None, ends if right_padded else None)
