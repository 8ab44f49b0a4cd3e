"""Attention of a few queries over thinned keys: a query needs the channels that the keys of its KV head still have.

Shapes: ``B`` batch, ``H`` query heads, ``n`` KV heads, ``G = H // n``, ``T`` queries, ``D'`` channels of a key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout.scores import Scores
from ..layout.thinned import Thinned
from .reference import capped, merge

TILE = 4096  # keys at once


def attend(q: Tensor, keys: Thinned, scores: Scores) -> tuple[Tensor, Tensor]:
    """out ``[B, H, T, D_v]`` and lse ``[B, H, T]`` of q ``[B, H, T, D]``, both float32 or wider; all keys are read.

    Of ``scores`` the scale and the cap alone.
    """
    with torch.autocast(q.device.type, enabled=False):  # it would round the scores
        return _attend(q, keys, scores)


def _attend(q: Tensor, keys: Thinned, scores: Scores) -> tuple[Tensor, Tensor]:
    (batch, heads, new, _), kv_heads = q.shape, keys.k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = q.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [B, n, G * T, D]
    rows = rows.gather(3, keys.channels[:, :, None].expand(-1, -1, rows.shape[2], -1)).to(dtype)
    parts = []
    for low in range(0, keys.length, TILE):
        k, v = (x[:, :, low : low + TILE].to(dtype) for x in (keys.k, keys.v))
        made = capped(rows @ k.transpose(2, 3) * scores.scale, scores.softcap)
        if keys.hidden is not None:
            made = made + keys.hidden[..., low : low + TILE].to(dtype)
        weights, total, lse = summed(made)
        parts.append((weights @ v / total, lse))
    out, lse = merge(parts)
    return out.reshape(batch, heads, new, -1), lse.reshape(batch, heads, new)


def summed(made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of scores ``[..., S]``: weights, their sum ``[..., 1]`` (above 0), logsumexp ``[...]``; of -inf 0 and -inf."""
    top = made.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0)
    weights = (made - top).exp()
    total = weights.sum(-1, keepdim=True)
    return weights, total.clamp(min=torch.finfo(total.dtype).tiny), (total.log() + top).squeeze(-1)
