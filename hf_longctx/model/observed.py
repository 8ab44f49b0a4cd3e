"""What an observer is shown beside plain tensors: how a layer is computed, and what a LongCtxCache still has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout.heads import RoleHeads
from ..layout.rows import Rows
from ..layout.scores import Scores
from ..layout.segments import HeadKV, joined


@dataclass(frozen=True, eq=False)
class Compute:
    """``compute(role)``: the layer's output ``[B, H, T, D]`` if every head had this role.

    Attributes:
        scores: how this layer makes its scores; ``softcap`` and ``sinks`` are what ``q . k * scaling`` leaves out.
    """

    _computed: Callable[[str], Tensor]
    scores: Scores

    def __call__(self, role: str) -> Tensor:
        return self._computed(role)


@dataclass(frozen=True, eq=False)
class CachedRole:
    """The cached tokens of the KV heads of one role in one layer, this forward's own among them.

    Only valid while the observer runs; what is quantised or elsewhere is unpacked or fetched when it is asked for.

    Attributes:
        heads: ``role`` and ``kv_heads``.
    """

    heads: RoleHeads
    _part: HeadKV
    _rows: Rows

    def sequence(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """k, v ``[n, S, D]`` of one sequence of the batch, and the row position ``[S]`` (int64) of each token.

        In the order in which they are stored, which for a ring is not that of the positions.
        """
        processed = self._rows.real(index)[1]
        if not processed:
            empty = self._part.segments[0].contents()
            return *(x[0, :, :0] for x in empty), torch.arange(0)
        segments, positions = self._part.spec.shown(self._part, self._rows, index)
        k, v = (x[0] for x in joined(segments))
        real = positions < processed  # a right-padded sequence ends in pads
        return k[:, real], v[:, real], positions[real]

    def dropped(self, index: int) -> int:
        """How many tokens of a sequence these heads no longer have."""
        return self._rows.real(index)[1] - self.sequence(index)[2].numel()

    def __repr__(self) -> str:
        gone = ", ".join(str(self.dropped(index)) for index in range(self._rows.batch))
        return f"CachedRole({self.heads.role} heads {list(self.heads.kv_heads)}, tokens dropped by sequence: {gone})"
