"""Attention weights of some queries over all cached tokens, in pieces, for scores that need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kernels.reference import capped
from .base import Seen

TEMPORARY = 1 << 24  # weights that are made at once
IN_CACHES = 1 << 18  # the same on a CPU, whose caches they fit in
FEWEST = 4  # queries at once

Change = Callable[[Seen, Tensor, int, int], Tensor]  # of the `logits` of the queries low .. high


def logits(seen: Seen, low: int, high: int) -> Tensor:
    """Scores of the queries ``low .. high`` of ``seen.q``, ``[B, H, high - low, S]``, float32 or wider; -inf: later."""
    scores = seen.scores
    dtype = torch.promote_types(seen.q.dtype, torch.float32)
    q = seen.q[:, :, low:high].to(dtype).unflatten(1, (seen.k.shape[1], -1)).flatten(2, 3)
    made = capped(q @ seen.k.to(dtype).transpose(2, 3) * scores.scale, scores.softcap)
    made = made.unflatten(2, (-1, high - low)).flatten(1, 2)
    made = with_first_bias(seen, made)
    own = seen.first + torch.arange(low, high, device=made.device)
    return made.masked_fill(seen.positions > own[:, None], float("-inf"))


def with_first_bias(seen: Seen, made: Tensor) -> Tensor:
    """Scores ``[B, H, T, S]`` and what the model adds to those of each sequence's first token."""
    if seen.scores.first_bias is None:
        return made
    first = (seen.positions == 0).to(made.dtype)
    return made + seen.scores.first_bias.to(made.dtype)[:, None, None] * first


def weights_of(seen: Seen, made: Tensor) -> Tensor:
    """Softmax of `logits` over the cached tokens, and the sinks without a value where the model has them."""
    if seen.scores.sinks is None:
        return made.softmax(-1)
    sinks = seen.scores.sinks.to(made.dtype)[:, None, None].expand(*made.shape[:3], 1)
    return torch.cat([made, sinks], -1).softmax(-1)[..., :-1]


def weights(seen: Seen) -> Tensor:
    """Attention weights ``[B, H, T, S]`` of all of ``seen.q``: for few queries."""
    return weights_of(seen, logits(seen, 0, seen.q.shape[2]))


def weights_in_pieces(seen: Seen, change: Change | None = None) -> Iterator[tuple[slice, Tensor]]:
    """(queries, their weights over the tokens up to the last of them), a few at a time; ``change``: of their scores."""
    rows = seen.q.shape[0] * seen.q.shape[1] * seen.k.shape[2]
    step = max(FEWEST, (IN_CACHES if seen.k.device.type == "cpu" else TEMPORARY) // max(1, rows))
    seen = replace(seen, k=seen.k.to(torch.promote_types(seen.k.dtype, torch.float32)))
    for low in range(0, seen.q.shape[2], step):
        high = min(low + step, seen.q.shape[2])
        before = seen.k.shape[2] - (seen.q.shape[2] - high)  # tokens
        part = replace(seen, k=seen.k[:, :, :before], v=seen.v[:, :, :before], positions=seen.positions[:before])
        made = logits(part, low, high)
        yield slice(low, high), weights_of(part, made if change is None else change(part, made, low, high))


def column_sums(seen: Seen, change: Change | None = None) -> Tensor:
    """Weights summed over all of ``seen.q``, their mean over the query heads of a KV head: ``[B, n, S]``."""
    sums = seen.q.new_zeros(*seen.q.shape[:2], seen.k.shape[2], dtype=torch.promote_types(seen.q.dtype, torch.float32))
    for _, made in weights_in_pieces(seen, change):
        sums[..., : made.shape[-1]] += made.sum(2)
    return of_kv_heads(seen, sums)


def readers(seen: Seen) -> Tensor:
    """How many of ``seen.q`` see each cached token, int64 ``[S]``."""
    return (seen.processed - seen.positions).clamp(0, seen.q.shape[2])


def of_kv_heads(seen: Seen, by_head: Tensor) -> Tensor:
    """``[B, H, S]`` as its mean over the query heads of each KV head, ``[B, n, S]``."""
    return by_head.unflatten(1, (seen.k.shape[1], -1)).mean(2)


def grown(seen: Seen, name: str) -> Tensor:
    """The numbers per cached token of that name in ``seen.state``, ``[B, n, S]``; 0 for tokens that came since."""
    known = seen.state.get(name)
    if known is None:
        return torch.zeros(seen.k.shape[:3], device=seen.k.device)
    return pad(known, (0, seen.k.shape[2] - known.shape[2]))
