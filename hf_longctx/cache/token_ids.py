"""The ids of the tokens a cache has seen, on their device, in a buffer that grows: nothing here reads a device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SPARE = 1024  # tokens: room that a new buffer has at least


class TokenIds:
    """Ids of the first ``length`` slots of every row, pads included.

    Tokens whose ids were not given (``inputs_embeds``, keys written by hand) end what is known: the ids of what comes
    after them are not kept, so ``length`` stays behind what the cache has seen.
    """

    dtype = torch.int32

    def __init__(self, max_tokens: int | None = None):
        self.max_tokens = max_tokens
        self.buffer: Tensor | None = None  # [B, capacity]
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory, spare room included."""
        return 0 if self.buffer is None else self.buffer.untyped_storage().nbytes()

    def append(self, past: int, ids: Tensor | None) -> None:
        """The slots from ``past`` on have ``ids [B, T]``; None: unknown ones. Later slots are forgotten."""
        self.crop(past)
        if ids is None or self.length < past:
            return
        needed = past + ids.shape[1]
        if self.buffer is None or self.buffer.shape[0] != ids.shape[0] or self.buffer.shape[1] < needed:
            self._grow(ids, needed)
        self.buffer[:, past:needed].copy_(ids)
        self.length = needed

    def _grow(self, ids: Tensor, needed: int) -> None:
        room = max(needed, self.max_tokens or needed + max(SPARE, needed // 8))
        with torch.inference_mode(False):  # so that it can be written outside of inference mode
            grown = torch.empty(ids.shape[0], room, dtype=self.dtype, device=ids.device)
        if self.length:
            grown[:, : self.length] = self.buffer[:, : self.length]
        self.buffer = grown

    def known(self, seen: int) -> Tensor | None:
        """Ids ``[B, seen]`` (int64), or None where some were not given, or nothing was seen."""
        return None if self.buffer is None or not 0 < seen <= self.length else self.buffer[:, :seen].long()

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` slots."""
        self.length = min(self.length, length)

    def stagger(self, pads: Sequence[int]) -> None:
        """Row ``i`` gives back its last ``pads[i]`` ids and gets as many zeros before its first."""
        if self.buffer is None:
            return
        with torch.inference_mode(False):
            self.buffer = self.buffer.clone()  # its rows may be one memory
            for row, count in enumerate(pads):
                self.buffer[row] = self.buffer[row].roll(count)
                self.buffer[row, :count] = 0

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or select the rows, as ``change`` does it to a tensor ``[B, ...]``."""
        if self.buffer is not None:
            with torch.inference_mode(False):
                self.buffer = change(self.buffer)

    def fork(self) -> TokenIds:
        """A copy that goes on by itself."""
        other = copy.copy(self)
        with torch.inference_mode(False):
            other.buffer = None if self.buffer is None else self.buffer.clone()
        return other

    def reset(self) -> None:
        """Forget everything, memory included."""
        self.buffer = None
        self.length = 0
