"""What clusters of keys weigh for queries: the softmax over the clusters and the numbers of their tokens, as logarithm.

Shapes: ``B`` sequences, ``n`` KV heads, ``R`` queries of one KV head (of its query heads and of several tokens), ``C``
clusters, ``D`` head_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EVERYTHING = torch.finfo(torch.float64).min  # a threshold that every cluster passes


def scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Of q ``[B, H, T, D]`` and mean keys ``[B, n, C, D]``: float32 or wider, ``[B, n, R, C]``."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    return grouped @ keys.to(wide).transpose(2, 3) * scale


def total(scores: Tensor, counts: Tensor) -> Tensor:
    """The logarithm of the sum over clusters of ``counts [B, n, C]`` tokens each, ``[B, n, R, 1]``."""
    return (scores + counts.to(scores.dtype).log()[:, :, None]).logsumexp(-1, keepdim=True)


def weights(scores: Tensor, total: Tensor) -> Tensor:
    """Of one token of each cluster, the mean over the queries, ``[B, n, C]``."""
    return (scores - total).logsumexp(2) - math.log(scores.shape[2])


def quantile(weights: Tensor, counts: Tensor, share: float) -> Tensor:
    """The threshold ``[B, 1, 1]`` that clusters of at most this share of the tokens do not pass.

    Args:
        weights: of clusters, float64 ``[B, N]``; equal ones pass together.
        counts: their tokens, ``[B, N]``.
    """
    ordered, at = weights.masked_fill(counts == 0, float("inf")).sort(dim=-1)
    tokens = counts.gather(1, at).cumsum(-1)
    ends = torch.searchsorted(ordered, ordered, right=True) - 1
    fits = (tokens.gather(1, ends) <= share * tokens[:, -1:]) & ordered.isfinite()
    return ordered.masked_fill(~fits, EVERYTHING).amax(-1)[:, None, None]
