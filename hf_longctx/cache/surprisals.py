"""``-log p`` of the tokens a cache has seen, where a score asks: made from hidden states, some at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..stores.base import SLACK
from .token_ids import TokenIds

WAITING = SLACK + 1  # hidden states that wait until the output head is run over them, or until they are taken back
NAMES = ("surprisals", "surprisals.hidden")  # of the tensors in a file
UNKNOWN = -1.0  # of a token before which nothing came, or nothing is known

LossesOf = Callable[[Tensor, Tensor], Tensor]  # of hidden states [B, T, D] and the ids [B, T] that they predict


class Surprisals(TokenIds):
    """Surprisal of the first ``length`` slots of every row, float32; of later ones the hidden states that predict them.

        slot      0 . . . . . . . . length . . . . . . . end
                  | in `buffer`     | waiting           |
                             | `hidden`                 |        that of a slot predicts the slot after it

    Attributes:
        hidden: the base model's last hidden states of the newest tokens, ``[B, W, D]``; None: none is known.
        end: slots up to the last of them.
    """

    dtype = torch.float32

    def __init__(self, max_tokens: int | None = None):
        super().__init__(max_tokens)
        self.hidden: Tensor | None = None
        self.end = 0

    def saw(self, past: int, hidden: Tensor) -> None:
        """The hidden states ``[B, T, D]`` of the slots from ``past`` on."""
        self.crop(past)
        before = self.hidden if self.end == past else None
        self.hidden = hidden if before is None else torch.cat([before, hidden], 1)
        self.end = past + hidden.shape[1]

    @property
    def waits(self) -> bool:
        """Whether so many tokens wait that the output head should be run over them."""
        return self.end - self.length >= WAITING

    def settle(self, ids: Tensor, starts: Sequence[int] | None, losses_of: LossesOf) -> None:
        """Run the output head over what waits.

        Args:
            ids: of all slots, ``[B, end]``.
            starts: first real slot of each row; None: 0.
        """
        if self.hidden is None or self.length >= self.end:
            return
        first, held = self.length, self.end - self.hidden.shape[1]
        found = torch.full((ids.shape[0], self.end - first), UNKNOWN, device=ids.device)
        low = max(first, held + 1)
        if low < self.end:
            states = self.hidden[:, low - 1 - held : self.end - 1 - held]
            found[:, low - first :] = losses_of(states, ids[:, low : self.end])
        for row, start in enumerate(starts or ()):
            found[row, : max(0, start + 1 - first)] = UNKNOWN
        end = self.end
        self.append(first, found)
        self.hidden, self.end = self.hidden[:, -WAITING:].clone(), end  # a view would keep all of them alive

    def append(self, past: int, ids: Tensor | None) -> None:
        hidden, end = self.hidden, self.end
        super().append(past, ids)
        self.hidden, self.end = hidden, end

    def known(self, seen: int) -> Tensor | None:
        """``[B, seen]``, or None where some are not known."""
        return None if self.buffer is None or not 0 < seen <= self.length else self.buffer[:, :seen]

    def crop(self, length: int) -> None:
        super().crop(length)
        if length < self.end:
            left = 0 if self.hidden is None else self.hidden.shape[1] - (self.end - length)
            self.hidden = self.hidden[:, :left] if left > 0 else None
            self.end = length

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super().map_rows(change)
        self.hidden = None if self.hidden is None else change(self.hidden)

    def saved(self, seen: int) -> dict[str, Tensor]:
        """What `restore` needs, once all was settled: by name ``[B, seen]``, and ``[B, 1, D]`` of the newest token."""
        return {NAMES[0]: self.known(seen).contiguous(), NAMES[1]: self.hidden[:, -1:].contiguous()}

    def restore(self, found: Tensor, hidden: Tensor) -> None:
        """Fill this empty one with what `saved` gave."""
        self.append(0, found)
        self.hidden, self.end = hidden.clone(), found.shape[1]

    def reset(self) -> None:
        super().reset()
        self.hidden = None
        self.end = 0
