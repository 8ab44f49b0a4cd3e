"""Calls over what an eviction left of each KV head and the tokens after it, and what they give: a loop in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from hf_longctx.layout.ragged import Ragged
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import Segment

SCALE = 0.4
# Tokens of each sequence and KV head: none at all, and those at the edges of tiles (64 keys) and of items (512).
LENGTHS = {
    "few": [[0, 1], [63, 64]],
    "edges": [[65, 511], [512, 513]],
    "three": [[0, 700, 2], [0, 0, 65]],
    "one sequence": [[64, 0]],
    "nothing": [[0, 0], [0, 0]],
}


def randoms(*shape, seed=0):
    make = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=make, dtype=torch.float64)


def ragged(lengths, dim, dtype, bias=False, lost=((0, 1),)) -> Ragged:
    """Parts with NaN before, between and after them, in every second row of memory that is NaN elsewhere.

    ``lost``: sequences and KV heads that have their first token no more.
    """
    lengths = torch.tensor(lengths)
    gaps = torch.arange(1, 1 + lengths.numel()).view_as(lengths) % 3 + 1
    starts = (lengths + gaps).flatten().cumsum(0).view_as(lengths) - lengths
    tokens = int(lengths.sum() + gaps.sum()) + 2
    k, v = (torch.full((2 * tokens, dim + 16), math.nan, dtype=dtype)[::2, :dim] for _ in range(2))
    positions = torch.full((tokens,), -7, dtype=torch.int32)
    made = Ragged(k, v, positions, starts, lengths, torch.full((tokens,), math.nan) if bias else None)
    for row in range(lengths.shape[0]):
        for n in range(lengths.shape[1]):
            own, count = made.of_head(row, n), int(lengths[row, n])
            k[own], v[own] = randoms(2, count, dim, seed=5 * row + n)
            positions[own] = torch.arange(count, dtype=torch.int32) * 3 + int((row, n) in lost)
            if bias:
                made.score_bias[own] = randoms(count, seed=row + 7 * n).float()
    return made


def after(batch, kv_heads, tokens, dim, dtype) -> Segment:
    """Plain tokens that come behind, in a buffer with room that is NaN."""
    k, v = torch.full((2, batch, kv_heads, tokens + 3, dim), math.nan, dtype=dtype)
    for x, seed in ((k, 11), (v, 12)):
        x[:, :, :tokens] = randoms(batch, kv_heads, tokens, dim, seed=seed)
    return Segment(k, v, tokens)


def scores_of(name: str, heads: int) -> Scores:
    bias = randoms(heads, seed=3).float() if "first" in name else None
    return Scores(SCALE, 1.5 if "softcap" in name else None, None, bias)


def wide(segment):
    if isinstance(segment, Segment):
        return replace(segment, k=segment.k.double(), v=segment.v.double())
    return replace(segment, k=segment.k.double(), v=segment.v.double())


def truth(q, segments, scores: Scores):
    """(out, lse); the queries are the last tokens of the last segment, or one that sees everything."""
    group = q.shape[1] // (segments[0].lengths if isinstance(segments[0], Ragged) else segments[0].k).shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            first = None if scores.first_bias is None else scores.first_bias[h].double()
            keys, values, added = _of_head(segments, b, h // group, first)
            for t in range(q.shape[2]):
                seen = len(keys) - (q.shape[2] - 1 - t)
                found = keys[:seen] @ q[b, h, t].double() * scores.scale
                if scores.softcap is not None:
                    found = scores.softcap * torch.tanh(found / scores.softcap)
                found = found + added[:seen]
                if seen > 0:
                    out[b, h, t], lse[b, h, t] = found.softmax(0) @ values[:seen], found.logsumexp(0)
    return out, lse


def _of_head(segments, row, n, first):
    keys, values, added = [], [], []
    for one in segments:
        if isinstance(one, Ragged):
            own = one.of_head(row, n)
            pair = one.k[own], one.v[own]
            bias = torch.zeros(len(pair[0])) if one.score_bias is None else one.score_bias[own]
            bias = bias.double()
            if first is not None:
                bias[one.positions[own] == 0] += first
        else:
            pair = one.k[row, n, : one.length], one.v[row, n, : one.length]
            bias = torch.zeros(one.length)
        for into, x in zip((keys, values, added), (*pair, bias), strict=True):
            into.append(x.double())
    return torch.cat(keys), torch.cat(values), torch.cat(added)


def same(got, want, allowed) -> bool:
    """Whether (out, lse) are equal but for ``allowed``, the same queries reading nothing."""
    (out, lse), (want_out, want_lse) = got, want
    empty = want_lse == -math.inf
    if not (torch.equal(lse == -math.inf, empty) and not out[empty].any()):
        return False
    errors = [(out.double() - want_out).abs(), (lse.double() - want_lse).masked_fill(empty, 0).abs()]
    return all(bool((error <= allowed).all()) for error in errors)  # False for NaN
