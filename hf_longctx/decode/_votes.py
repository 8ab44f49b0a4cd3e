"""From the scores of query heads to the entries that a KV head reads.

Shapes: ``B`` sequences, ``H`` query heads, ``n`` KV heads, ``E`` entries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def vote(scores: Tensor, kv_heads: int, how: str) -> Tensor:
    """One score per KV head, ``[B, n, E]``, of the scores ``[B, H, E]`` of its query heads.

    Args:
        how: ``max``, ``mean`` or ``softmax`` (the sum of the heads' softmax over the entries, as its logarithm), of the
            query heads of a KV head; ``layer``: as ``softmax`` over all query heads, for all KV heads alike.
    """
    grouped = scores.unflatten(1, (kv_heads, -1))
    if how == "max":
        return grouped.amax(2)
    if how == "mean":
        return grouped.mean(2)
    shares = grouped.log_softmax(-1)
    if how == "softmax":
        return shares.logsumexp(2)
    if how == "layer":
        return shares.flatten(1, 2).logsumexp(1, keepdim=True).expand(-1, kv_heads, -1)
    raise ValueError(f"how: got {how!r}, expected max, mean, softmax or layer")


def best(votes: Tensor, width: int, mass: float | None = None) -> tuple[Tensor, Tensor | None]:
    """The ``width`` best of votes ``[B, n, E]``: int32 ``[B, n, width]``, ascending, and their counts or None.

    Equal votes go to the lowest entry.

    Args:
        mass: as few of the best as have this share of the softmax of the votes; None: ``width`` of them.
    """
    votes = votes.masked_fill(votes.isnan(), float("-inf"))
    total = votes.shape[2]
    width = min(width, total)
    values = votes.topk(width).values
    counts = torch.full(votes.shape[:2], width, dtype=torch.int32, device=votes.device)
    if mass is not None:
        shares = (values - votes.logsumexp(2, keepdim=True)).exp().cumsum(-1)
        counts = ((shares < mass).sum(-1) + 1).clamp(max=width).int()
    least = values.gather(2, counts[..., None].long() - 1)
    more = votes > least
    equal = votes == least
    left = counts - more.sum(-1)
    chosen = more | (equal & (equal.cumsum(-1) <= left[..., None]))
    # The lowest entries are the largest of these; what is not chosen comes last, as 0.
    places = torch.arange(total, 0, -1, dtype=torch.int32, device=votes.device)
    entries = total - torch.where(chosen, places, 0).topk(width).values
    return entries.masked_fill(entries == total, 0), None if mass is None else counts
