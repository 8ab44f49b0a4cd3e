"""What a LongCtxCache does to the sequences of its batch: reorder, repeat, select, and realign them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import CacheError
from ..layout.rows import Rows
from .roll_back import whole


class SequenceOperations:
    """Part of `LongCtxCache`."""

    @property
    def stagger_room(self) -> int:
        """How far `stagger` can take rows back: tokens."""
        stores = [store for layer in self.own for store in layer.stores]
        if (
            self._blank
            or any(self.starts or ())
            or self.ends
            or not all(store.staggers and not store.state for store in stores)
        ):
            return 0
        return max(0, self.seen - max(1, self.oldest_crop))

    def stagger(self, pads: Sequence[int]) -> None:
        """Remove the last ``pads[i]`` tokens of sequence ``i`` and left-pad it by as many; the padded length stays.

        So sequences that share one prompt go on by texts of different lengths and still share it: as a left-padded
        batch of whole texts, of which the next forward has the columns from ``seen`` on. Its positions count real
        tokens, as ``generate`` has it; a forward without ``position_ids`` gets those.

        Raises:
            CacheError: rows cannot go so far back (`stagger_room`); nothing is changed.
        """
        self.check()
        if len(pads) != self.batch_size or min(pads) < 0 or max(pads) > self.stagger_room:
            raise CacheError(
                f"cannot stagger {self.batch_size} rows by {list(pads)}: give one number a row, from 0 to "
                f"{self.stagger_room}, the tokens that this cache can take back. Read texts of one length together."
            )
        if not any(pads):
            return
        for layer in self.own:
            layer.stagger(Rows(self.batch_size, 0, layer.seen), pads)
        self.token_ids.stagger(pads)
        self.starts = tuple(pads)
        self.forward = None
        self.staggered = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was; CacheError for a half-written cache."""
        beam_idx = torch.as_tensor(beam_idx)
        self._map_rows(beam_idx, lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, next to each other; CacheError for a half-written cache."""
        repeats = whole(repeats, "batch_repeat_interleave")
        if repeats < 1:
            raise CacheError(f"batch_repeat_interleave({repeats}): every row must stay at least once.")
        rows = torch.arange(self.batch_size).repeat_interleave(repeats)
        self._map_rows(rows, lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor | Sequence[int] | slice) -> None:
        """Keep the rows ``indices``, whatever a tensor's first dimension takes; CacheError for a half-written cache."""
        if self.batch_size == -1:
            return
        given = indices if isinstance(indices, slice) else torch.as_tensor(indices).cpu()
        try:
            rows = torch.arange(self.batch_size)[given]
        except IndexError:
            rows = torch.empty(0, dtype=torch.int64)
        if rows.dim() != 1 or not len(rows):
            raise CacheError(
                f"batch_select_indices({indices}): this cache holds {self.batch_size} rows; give a list of those to "
                "keep."
            )
        self._map_rows(rows, lambda tensor: tensor[rows.to(tensor.device)])

    def _map_rows(self, picked: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        if self.batch_size == -1:
            return
        self._refuse_half_written()
        if any(one is not None for one in (self.starts, self.ends, self.ahead)):
            rows = picked.tolist()
            self.ahead = self.ahead and tuple(self.ahead[row] for row in rows)
            self.starts = self.starts and tuple(self.starts[row] for row in rows)
            self.ends = self.ends and tuple(self.ends[row] for row in rows)
        filled = [layer for layer in self.own if layer.is_initialized]
        for layer in filled:
            layer.whole = False  # also where this is interrupted between two layers
        for layer in filled:
            layer.map_rows(change, picked.numel())
        self._change_stock(change)
        for numbers in self.by_slot:
            numbers.map_rows(change)
        self.forward = None
