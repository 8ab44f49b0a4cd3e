"""The one interface between caches and kernels: what a role's KV heads keep, as segments.

Shapes: ``B`` batch, ``n`` KV heads of one role, ``G`` query heads per KV head, ``T`` tokens of this forward, ``S``
tokens kept, ``D`` head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoleHeads:
    """The KV heads of one layer that share a role.

    Attributes:
        role: ``"retrieval"`` or ``"streaming"``.
        kv_heads: their indices, ascending.
        total: KV heads of the layer (on this process, under tensor parallel).
    """

    role: str
    kv_heads: tuple[int, ...]
    total: int

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """``kv_heads`` as ranges, so that heads are taken by slices and never by an index that lives on a device."""
        runs: list[tuple[int, int]] = []
        for head in self.kv_heads:
            if runs and runs[-1][1] == head:
                runs[-1] = (runs[-1][0], head + 1)
            else:
                runs.append((head, head + 1))
        return tuple(runs)

    def take(self, x: Tensor, group: int = 1) -> Tensor:
        """These heads of ``x [B, total * group, ...]``: a view where they are neighbours, else a copy."""
        parts = [x[:, a * group : b * group] for a, b in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def copy_to(self, into: Tensor, x: Tensor) -> None:
        """Write these heads of ``x [B, total, ...]`` into ``into [B, len(kv_heads), ...]``, without a gradient."""
        done = 0
        for a, b in self.runs:
            into[:, done : done + b - a].copy_(x[:, a:b].detach())
            done += b - a


@dataclass
class Segment:
    """Keys and values of consecutive kept tokens. Growing buffers, rings, pages and shared prefixes are all segments.

    Attributes:
        k: keys ``[B, n, capacity, D]``; slots from ``length`` on are uninitialised memory.
        v: values ``[B, n, capacity, D_v]``.
        length: tokens kept, in every row (int) or row by row (int64 ``[B]``).
        bias: added to the scores of these keys before the softmax, broadcastable to ``[B, n, 1, length]``.
        shared: the memory belongs to another cache as well, so a writer must copy it first.
    """

    k: Tensor
    v: Tensor
    length: int | Tensor
    bias: Tensor | None = None
    shared: bool = False

    @property
    def longest(self) -> int:
        """Slots that a reader must look at: ``length``, or the whole capacity where rows differ."""
        return self.length if isinstance(self.length, int) else self.k.shape[2]

    def kept(self) -> tuple[Tensor, Tensor]:
        """Views of the filled slots: k, v ``[B, n, longest, D]``."""
        return self.k[:, :, : self.longest], self.v[:, :, : self.longest]


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
        store: the spec of the store, which knows its visibility rule.
        state: tensors a decode selector keeps between steps.
    """

    heads: RoleHeads
    segments: list[Segment]
    store: object
    sinks: Segment | None = None
    first: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient must flow through one of them."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype torch.autocast would give them, as SDPA does by itself; unchanged without autocast.

    Under autocast a model's rotated q and k are float32 while its v is not.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
