"""Clusters by their votes, and the tokens of the best of them.

Shapes: ``B`` sequences, ``n`` KV heads, ``C`` clusters, ``M`` tokens or clusters that are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Ranked:
    """Clusters, the best first and of equal ones the lowest, ``[B, n, C]`` each.

    Attributes:
        votes: -inf for clusters without tokens.
        clusters: which ones.
        counts: their tokens.
        begins: where these begin among all tokens, ordered by cluster.
        ends: tokens of those up to and with each.
    """

    votes: Tensor
    clusters: Tensor
    counts: Tensor
    begins: Tensor
    ends: Tensor

    @classmethod
    def of(cls, votes: Tensor, counts: Tensor, begins: Tensor | None = None) -> Ranked:
        """Of votes and int64 counts ``[B, n, C]``; ``begins``: None where these are all clusters, in order."""
        votes, clusters = votes.masked_fill(counts == 0, float("-inf")).sort(dim=-1, descending=True, stable=True)
        begins = (counts.cumsum(-1) - counts if begins is None else begins).gather(2, clusters)
        counts = counts.gather(2, clusters)
        return cls(votes, clusters, counts, begins, counts.cumsum(-1))

    def limit(self, width: int, mass: float | None) -> Tensor:
        """How many tokens are read, ``[B, n, 1]``: ``width``, or fewer where the best clusters have the mass."""
        most = torch.full_like(self.ends[..., :1], width)
        if mass is None:
            return most
        shares = (self.votes + self.counts.log()).softmax(-1).cumsum(-1)
        needed = (shares < mass).sum(-1, keepdim=True).clamp(max=shares.shape[2] - 1)
        return most.minimum(self.ends.gather(2, needed))

    def above(self, threshold: Tensor) -> Tensor:
        """The tokens of those whose votes are above this, ``[B, n, 1]``."""
        return self.counts.masked_fill(self.votes <= threshold, 0).sum(-1, keepdim=True)

    def places(self, width: int) -> Tensor:
        """Where the first ``width`` tokens of these clusters stand among all, ordered by cluster, ``[B, n, width]``.

        Anything where a head has fewer.
        """
        tokens = torch.arange(width, device=self.ends.device).expand(*self.ends.shape[:2], -1).contiguous()
        tokens = tokens.minimum(self.ends[..., -1:] - 1).clamp(min=0)
        rank = torch.searchsorted(self.ends, tokens, right=True).clamp(max=self.ends.shape[2] - 1)
        return tokens + (self.begins - self.ends + self.counts).gather(2, rank)

    def next(self, limit: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The ``width`` best clusters that are not wholly read, ``[B, n, width]``, and how many tokens of each."""
        last = self.ends.shape[2] - 1
        at = (self.ends <= limit).sum(-1, keepdim=True) + torch.arange(width, device=limit.device)
        left = (self.ends - limit).clamp(min=0).minimum(self.counts).gather(2, at.clamp(max=last))
        return self.clusters.gather(2, at.clamp(max=last)), left.masked_fill(at > last, 0)


def ascending(tokens: Tensor, limit: Tensor, after: int) -> Tensor:
    """The first ``limit [B, n, 1]`` of ``tokens [B, n, M]``, ascending; what stands behind them is ``after``."""
    unread = torch.arange(tokens.shape[2], device=tokens.device) >= limit
    return tokens.masked_fill(unread, after).sort(-1).values
