"""Which KV heads of a layer share a role."""

from __future__ import annotations

from dataclasses import dataclass
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

    def queries(self, group: int) -> list[int]:
        """The query heads of these KV heads, ``group`` of each, in order."""
        return [head * group + g for head in self.kv_heads for g in range(group)]

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
