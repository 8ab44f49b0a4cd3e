"""Attention of a few queries over what two layers share: products with a direction, times its length.

Shapes: ``B`` batch, ``n`` KV heads, ``R`` queries of a KV head, ``S`` keys, ``D`` head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout.merged import Half, Merged
from ..layout.scores import Scores
from ._thinned import TILE, summed
from .reference import capped

TEMPORARY = 1 << 24  # scores at once


def attend(q: Tensor, keys: Merged, scores: Scores) -> tuple[Tensor, Tensor]:
    """out ``[B, H, T, D_v]`` and lse ``[B, H, T]`` of q ``[B, H, T, D]``, both float32 or wider; all keys are read.

    Of ``scores`` the scale and the cap alone.
    """
    batch, kv_heads, _ = keys.form
    with torch.autocast(q.device.type, enabled=False):  # it would round the scores
        rows = q.unflatten(1, (kv_heads, -1)).flatten(2, 3).to(torch.promote_types(q.dtype, torch.float32))
        some = max(1, TEMPORARY // max(1, batch * kv_heads * keys.length))
        parts = [_attend(rows[:, :, low : low + some], keys, scores) for low in range(0, rows.shape[2], some)]
    out, lse = (torch.cat(one, 2) for one in zip(*parts, strict=True))
    return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])


def _attend(rows: Tensor, keys: Merged, scores: Scores) -> tuple[Tensor, Tensor]:
    made = capped(_products(rows, keys.k) * scores.scale, scores.softcap)
    if keys.hidden is not None:
        made = made + keys.hidden.to(made.dtype)
    weights, total, lse = summed(made)
    return _sums(weights, keys.v) / total, lse


def _products(rows: Tensor, half: Half) -> Tensor:
    """Of rows ``[B, n, R, D]`` and all vectors of a half, ``[B, n, R, S]``."""
    count = half.norm.shape[2]
    made = rows.new_empty(*rows.shape[:3], count + 1)  # one more for what is elsewhere
    for low in range(0, count, TILE):
        unit = half.common.unit[:, :, low : low + TILE]
        made[..., low : low + unit.shape[2]] = rows @ unit.to(rows.dtype).transpose(2, 3)
    made[..., :count] *= half.norm[:, :, None].to(rows.dtype)
    exact = rows @ half.exact.to(rows.dtype).transpose(2, 3)
    at = half.places(0, count)[:, :, None].expand_as(exact)
    return made.scatter(3, at, exact)[..., :count]


def _sums(weights: Tensor, half: Half) -> Tensor:
    """Of the vectors of a half, by weights ``[B, n, R, S]``: ``[B, n, R, D]``."""
    count = half.norm.shape[2]
    at = half.places(0, count)[:, :, None].expand(-1, -1, weights.shape[2], -1)
    made = pad(weights, (0, 1)).gather(3, at) @ half.exact.to(weights.dtype)
    others = pad(weights * half.norm[:, :, None].to(weights.dtype), (0, 1)).scatter(3, at, 0)
    for low in range(0, count, TILE):
        unit = half.common.unit[:, :, low : low + TILE]
        made += others[..., low : low + unit.shape[2]] @ unit.to(weights.dtype)
    return made
