"""What an observer is shown beside plain tensors: how a layer is computed, and what a LongCtxCache still has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import base as kernels
from ..kernels.reference import capped
from ..layout.forward import Forward
from ..layout.heads import RoleHeads
from ..layout.reads import ALL, Averaged, Window
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

    def weights(self, q: Tensor, queries: Tensor, scores: Scores) -> Tensor:
        """Attention weights ``[h, t, S]`` of some queries of one sequence over all its tokens, 0 for what is dropped.

        Where something without a token takes its share of the softmax (a sink, the mean of dropped tokens), the weights
        of a query add up to less than 1.

        Args:
            q: of all heads of the layer, ``[1, H, T, D]``, rotated.
            queries: row positions ``[t]`` of the wanted ones, int64 on the CPU, among the last T.
            scores: how the layer makes them.
        """
        group = q.shape[1] // self.heads.total
        own = scores.of(self.heads)
        q = self.heads.take(q, group)
        k, _, positions = self.sequence(0)
        new, processed = self._rows.real(0)
        columns = queries - (processed - new)
        dtype = torch.promote_types(q.dtype, torch.float32)
        some = q[0, :, columns].to(dtype).unflatten(0, (k.shape[0], group)).flatten(1, 2)
        made = capped(some @ k.to(dtype).transpose(1, 2) * own.scale, own.softcap).view(
            -1, len(queries), len(positions)
        )
        if own.first_bias is not None:
            made = made + own.first_bias.to(made)[:, None, None] * (positions == 0).to(made)
        made = made.masked_fill(~self._visible(queries, positions).to(made.device), float("-inf"))
        if self._part.spec.estimates:
            made = (made - self._lse(q, own)[:, columns, None]).exp()
        elif own.sinks is not None:
            made = torch.cat([made, own.sinks.to(made)[:, None, None].expand(-1, len(queries), 1)], -1)
            made = made.softmax(-1)[..., :-1]
        else:
            made = made.softmax(-1)
        found = made.new_zeros(made.shape[0], len(queries), processed)
        found[..., positions] = made
        return found

    def _visible(self, queries: Tensor, positions: Tensor) -> Tensor:
        """Bool ``[t, S']``: which cached tokens these queries read."""
        i = queries[:, None]
        visible = positions <= i
        if self._rows.new == 1:
            return visible
        segments, reads = self._part.spec.reads(self._part, self._rows, slice(0, 1), self._rows.start(0))
        if isinstance(reads, Window):
            return visible & ((positions < segments[0].length) | (i - positions < reads.recent))
        if isinstance(reads, Averaged):
            edges = torch.tensor([reads.edge(int(query)) for query in queries])[:, None]
            return visible & ((positions < reads.sink) | (positions >= edges))
        return visible

    def _lse(self, q: Tensor, scores: Scores) -> Tensor:
        """Log of the softmax's denominator ``[h, T]``, of all that a kernel reads."""
        if self._rows.new == 1:
            segments, reads = self._part.segments, ALL
        else:
            segments, reads = self._part.spec.reads(self._part, self._rows, slice(0, 1), self._rows.start(0))
        return kernels.attend("auto", q.to(self._part.dtype), segments, reads, scores, Forward(self._rows), True)[1][0]

    def __repr__(self) -> str:
        gone = ", ".join(str(self.dropped(index)) for index in range(self._rows.batch))
        return f"CachedRole({self.heads.role} heads {list(self.heads.kv_heads)}, tokens dropped by sequence: {gone})"
