"""Prefill of streaming heads whose dropped tokens live on as their mean (RazorAttention, arXiv:2407.15891).

Plain torch, any device, differentiable. Shapes: ``B`` batch, ``H`` query heads, ``n`` KV heads, ``T`` query tokens,
``D`` head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout.pieces import pieces

NAME = "compensated"  # what the report calls it

QUERIES = 128  # of a block: more would read more keys outside the window, fewer would copy more keys per query
FEWEST = 16  # queries of a block where windows are long
TEMPORARY = 1 << 22  # numbers per temporary: scores, or keys that are summed

Pair = tuple[Tensor, Tensor]  # keys and values


@dataclass(frozen=True, eq=False)
class Windows:
    """The visibility rule, for the queries of one call.

    Attributes:
        sink: first tokens, which every later query sees.
        edge: first row position of a query's window, by the query's; nondecreasing, and never below ``sink``.
        edges: the same of every query of the call, int64 ``[T]``.
        end: row position after the last query.
    """

    sink: int
    edge: Callable[[int], int]
    edges: Tensor
    end: int


def prefill(
    q: Tensor, sinks: Pair, band: Pair, dropped: Pair | None, windows: Windows, *, first: int, scale: float
) -> Tensor:
    """Attention ``[B, H, T, D]`` of the last T row positions over sinks, window, and the mean of all between them.

    Query i reads the sinks j <= i, the positions edge(i) <= j <= i, and the mean of the keys sink..edge(i)-1 as one
    key whose score has the log of their number added. Softmax in float32 or wider, sums of dropped keys in float64. No
    temporary but the output grows with T; the work is O(T * (sink + window + QUERIES)).

    Args:
        sinks: k, v ``[B, n, s, D]`` of the row positions 0..s-1; s is ``sink``, or less where the row is shorter.
        band: k, v ``[B, n, N, D]`` of the positions from ``first`` (at least ``sink``) to the end.
        dropped: sums of k and of v over the positions sink..first-1, float64 ``[B, n, 1, D]``; None: there are none.
    """
    (batch, heads, _, dim), n = q.shape, sinks[0].shape[1]
    if dropped is None:
        dropped = tuple(x.new_zeros(batch, n, 1, x.shape[3], dtype=torch.float64) for x in sinks)
    group, keys = heads // n, sinks[0].shape[2] + max(0, windows.end - windows.edge(windows.end - 1)) + QUERIES
    rows = max(FEWEST, min(QUERIES, TEMPORARY // (batch * group * keys)))
    outs = []
    with torch.autocast(q.device.type, enabled=False):  # it would round the scores
        for some in pieces(n, batch * keys * max(group * rows, dim), TEMPORARY):
            own = q[:, some.start * group : some.stop * group]
            kept = (tuple(x[:, some] for x in pair) for pair in (sinks, band, dropped))
            outs.append(_heads(own, *kept, windows, first, rows, scale))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def _heads(
    q: Tensor, sinks: Pair, band: Pair, sums: Pair, windows: Windows, first: int, rows: int, scale: float
) -> Tensor:
    """`prefill` of a few KV heads, in blocks of ``rows`` queries. ``sums`` is of all positions before ``done``."""
    begin, sink, outs = windows.end - q.shape[2], windows.sink, []
    done = max(first, windows.edge(begin))
    sums = tuple(one + total(x[:, :, : done - first]) for one, x in zip(sums, band, strict=True))
    for low in range(begin, windows.end, rows):
        high = min(low + rows, windows.end)
        edges = windows.edges[low - begin : high - begin]
        passed = max(done, windows.edge(high - 1))
        found = [
            _running_mean(one, x[:, :, done - first : passed - first], edges - done, edges - sink)
            for one, x in zip(sums, band, strict=True)
        ]
        sums, means = zip(*found, strict=True)
        seen = slice(done - first, max(done, high) - first)
        window = tuple(x[:, :, seen] for x in band)
        i = torch.arange(low, high, device=q.device)[:, None]
        j = torch.arange(done, max(done, high), device=q.device)
        slot = torch.arange(sinks[0].shape[2], device=q.device)
        visible = torch.cat([slot <= i, (j >= edges[:, None]) & (j <= i)], 1)
        keys, values = (torch.cat(pair, 2) for pair in zip(sinks, window, strict=True))
        outs.append(_block(q[:, :, low - begin : high - begin], keys, values, means, edges - sink, visible, scale))
        done = passed
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _running_mean(before: Tensor, x: Tensor, places: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The sum with all of x ``[B, n, m, D]`` added, and for each query the mean ``[B, n, t, D]`` of what it dropped.

    That is ``before`` and the first ``places[i]`` of x, ``counts[i]`` keys in all.
    """
    sums = torch.cat([before, before + x.to(before.dtype).cumsum(2)], 2)
    return sums[:, :, -1:], sums.index_select(2, places) / counts.clamp(min=1)[:, None]


def _block(q: Tensor, k: Tensor, v: Tensor, means: Pair, counts: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attention ``[B, H, t, D]`` over the visible ones of S keys, bool ``[t, S]``, and each query's own mean."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    n, group = k.shape[1], q.shape[1] // k.shape[1]
    split, (mean_k, mean_v) = (group, q.shape[2]), (x.to(dtype)[:, :, None] for x in means)
    folded = q.unflatten(1, (n, group)).flatten(2, 3).to(dtype) * scale
    scores = (folded @ k.to(dtype).transpose(2, 3)).unflatten(2, split).masked_fill(~visible, float("-inf"))
    mean = (folded.unflatten(2, split) * mean_k).sum(-1, keepdim=True) + counts.to(dtype).log()[:, None]
    weights = torch.cat([scores, mean], -1).softmax(-1)
    out = (weights[..., :-1].flatten(2, 3) @ v.to(dtype)).unflatten(2, split) + weights[..., -1:] * mean_v
    return out.flatten(1, 2).to(q.dtype)


def total(x: Tensor) -> Tensor:
    """Sum over the tokens of ``x [B, n, m, D]``, float64 ``[B, n, 1, D]``, with temporaries of bounded size."""
    each = x.shape[0] * x.shape[1] * x.shape[3]
    done = x.new_zeros(x.shape[0], x.shape[1], 1, x.shape[3], dtype=torch.float64)
    for some in pieces(x.shape[2], each, TEMPORARY):
        done = done + x[:, :, some].sum(2, keepdim=True, dtype=torch.float64)
    return done
