"""Prefill of streaming heads whose dropped tokens live on as their mean (RazorAttention, arXiv:2407.15891).

Plain torch, any device, differentiable. Shapes: ``B`` batch, ``H`` query heads, ``n`` KV heads, ``T`` query tokens,
``D`` head_dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..layout.pieces import pieces
from ..layout.reads import Averaged
from ..layout.scores import Scores
from .reference import capped

QUERIES = 128  # of a block: more would read more keys outside the window, fewer would copy more keys per query
FEWEST = 16  # queries of a block where windows are long
TEMPORARY = 1 << 22  # numbers per temporary: scores, or keys that are summed

Pair = tuple[Tensor, Tensor]  # keys and values


def attend(
    q: Tensor, sinks: Pair, band: Pair, reads: Averaged, scores: Scores, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(out ``[B, H, T, D]``, lse ``[B, H, T]``) over sinks, window, and the mean of all between them.

    Softmax in float32 or wider, sums of dropped keys in float64. No temporary but the output grows with T; the work is
    O(T * (sink + window + QUERIES)).

    Args:
        sinks: k, v ``[B, n, s, D]`` of the row positions 0..s-1; s is ``reads.sink``, or less where the row is shorter.
        band: k, v ``[B, n, N, D]`` of the positions from ``reads.first`` to the end.
    """
    (batch, heads, _, dim), n = q.shape, sinks[0].shape[1]
    dropped = reads.dropped
    if dropped is None:
        dropped = tuple(x.new_zeros(batch, n, 1, x.shape[3], dtype=torch.float64) for x in sinks)
    group = heads // n
    keys = sinks[0].shape[2] + max(0, reads.end - reads.edge(reads.end - 1)) + QUERIES
    rows = max(FEWEST, min(QUERIES, TEMPORARY // (batch * group * keys)))
    parts = []
    with torch.autocast(q.device.type, enabled=False):  # it would round the scores
        for some in pieces(n, batch * keys * max(group * rows, dim), TEMPORARY):
            mine = slice(some.start * group, some.stop * group)
            own = tuple(tuple(x[:, some] for x in pair) for pair in (sinks, band, dropped))
            bias = None if scores.first_bias is None else scores.first_bias[mine]
            parts.append(_heads(q[:, mine], *own, reads, replace(scores, first_bias=bias), rows, want_lse))
    return _cat(parts, 1)


def _heads(
    q: Tensor, sinks: Pair, band: Pair, sums: Pair, reads: Averaged, scores: Scores, rows: int, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """`attend` of a few KV heads, in blocks of ``rows`` queries. ``sums`` is of all positions before ``done``."""
    begin = reads.end - q.shape[2]
    first = reads.first
    parts = []
    done = max(first, reads.edge(begin))
    sums = tuple(one + total(x[:, :, : done - first]) for one, x in zip(sums, band, strict=True))
    for low in range(begin, reads.end, rows):
        high = min(low + rows, reads.end)
        edges = reads.edges[low - begin : high - begin]
        counts = edges - reads.sink
        passed = max(done, reads.edge(high - 1))
        found = [
            _running_mean(one, x[:, :, done - first : passed - first], edges - done, counts)
            for one, x in zip(sums, band, strict=True)
        ]
        sums, means = zip(*found, strict=True)
        window = slice(done - first, max(done, high) - first)
        keys, values = (torch.cat([own, x[:, :, window]], 2) for own, x in zip(sinks, band, strict=True))
        i = torch.arange(low, high, device=q.device)[:, None]
        j = torch.arange(done, max(done, high), device=q.device)
        slots = torch.arange(sinks[0].shape[2], device=q.device)
        visible = torch.cat([slots <= i, (j >= edges[:, None]) & (j <= i)], 1)
        bias = None if scores.first_bias is None else _first_bias(scores.first_bias, torch.cat([slots, j]))
        own = q[:, :, low - begin : high - begin]
        parts.append(_block(own, keys, values, means, counts, visible, bias, scores, want_lse))
        done = passed
    return _cat(parts, 2)


def _first_bias(bias: Tensor, positions: Tensor) -> Tensor:
    """``bias [H]`` at the position 0, ``[H, 1, S]`` for ``positions [S]``."""
    return torch.where(positions == 0, bias[:, None, None], 0)


def _cat(parts: list[tuple[Tensor, Tensor | None]], dim: int) -> tuple[Tensor, Tensor | None]:
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim), None if lses[0] is None else torch.cat(lses, dim)


def _running_mean(before: Tensor, x: Tensor, places: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The sum with all of x ``[B, n, m, D]`` added, and for each query the mean ``[B, n, t, D]`` of what it dropped.

    That is ``before`` and the first ``places[i]`` of x, ``counts[i]`` keys in all.
    """
    sums = torch.cat([before, before + x.to(before.dtype).cumsum(2)], 2)
    return sums[:, :, -1:], sums.index_select(2, places) / counts.clamp(min=1)[:, None]


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Pair,
    counts: Tensor,
    visible: Tensor,
    bias: Tensor | None,
    scores: Scores,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """(out ``[B, H, t, D]``, lse) over the visible ones of S keys, bool ``[t, S]``, and each query's own mean.

    ``bias [H, 1, S]`` is added to the capped scores of the keys.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    n = k.shape[1]
    group = q.shape[1] // k.shape[1]
    split, (mean_k, mean_v) = (group, q.shape[2]), (x.to(dtype)[:, :, None] for x in means)
    folded = q.unflatten(1, (n, group)).flatten(2, 3).to(dtype) * scores.scale
    of_keys = capped((folded @ k.to(dtype).transpose(2, 3)).unflatten(2, split), scores.softcap)
    if bias is not None:
        of_keys = of_keys + bias.to(dtype).unflatten(0, (n, group))
    of_mean = capped((folded.unflatten(2, split) * mean_k).sum(-1, keepdim=True), scores.softcap)
    of_mean = of_mean + counts.to(dtype).log()[:, None]
    every = torch.cat([of_keys.masked_fill(~visible, float("-inf")), of_mean], -1)
    weights = every.softmax(-1)
    out = (weights[..., :-1].flatten(2, 3) @ v.to(dtype)).unflatten(2, split) + weights[..., -1:] * mean_v
    lse = every.logsumexp(-1).flatten(1, 2) if want_lse else None
    return out.flatten(1, 2).to(q.dtype), lse


def total(x: Tensor) -> Tensor:
    """Sum over the tokens of ``x [B, n, m, D]``, float64 ``[B, n, 1, D]``, with temporaries of bounded size."""
    each = x.shape[0] * x.shape[1] * x.shape[3]
    done = x.new_zeros(x.shape[0], x.shape[1], 1, x.shape[3], dtype=torch.float64)
    for some in pieces(x.shape[2], each, TEMPORARY):
        done = done + x[:, :, some].sum(2, keepdim=True, dtype=torch.float64)
    return done
