"""Attention weights of some queries over all cached tokens, in pieces, for scores that need them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels.reference import capped
from .base import Seen

TEMPORARY = 1 << 24  # weights that are made at once


def logits(seen: Seen, low: int, high: int) -> Tensor:
    """Scores of the queries ``low .. high`` of ``seen.q``, ``[B, H, high - low, S]``, float32 or wider; -inf: later."""
    scores = seen.scores
    dtype = torch.promote_types(seen.q.dtype, torch.float32)
    q = seen.q[:, :, low:high].to(dtype).unflatten(1, (seen.k.shape[1], -1)).flatten(2, 3)
    made = capped(q @ seen.k.to(dtype).transpose(2, 3) * scores.scale, scores.softcap)
    made = made.unflatten(2, (-1, high - low)).flatten(1, 2)
    if scores.first_bias is not None:
        first = (seen.positions == 0).to(dtype)
        made = made + scores.first_bias.to(dtype)[:, None, None] * first
    own = seen.first + torch.arange(low, high, device=made.device)
    return made.masked_fill(seen.positions > own[:, None], float("-inf"))


def weights_of(seen: Seen, made: Tensor) -> Tensor:
    """Softmax of `logits` over the cached tokens, and the sinks without a value where the model has them."""
    if seen.scores.sinks is None:
        return made.softmax(-1)
    sinks = seen.scores.sinks.to(made.dtype)[:, None, None].expand(*made.shape[:3], 1)
    return torch.cat([made, sinks], -1).softmax(-1)[..., :-1]


def weights(seen: Seen) -> Tensor:
    """Attention weights ``[B, H, T, S]`` of all of ``seen.q``: for few queries."""
    return weights_of(seen, logits(seen, 0, seen.q.shape[2]))


def weights_in_pieces(seen: Seen) -> Iterator[tuple[slice, Tensor]]:
    """(queries, their weights ``[B, H, t, S]``), a few queries at a time."""
    rows = seen.q.shape[0] * seen.q.shape[1] * seen.k.shape[2]
    step = max(1, TEMPORARY // max(1, rows))
    for low in range(0, seen.q.shape[2], step):
        high = min(low + step, seen.q.shape[2])
        yield slice(low, high), weights_of(seen, logits(seen, low, high))
