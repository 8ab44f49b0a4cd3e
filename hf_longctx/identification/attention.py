"""Attention weights of observed layers, by pieces of queries: no matrix of all queries and keys is ever kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..layout.pieces import pieces
from ..layout.scores import Scores

ENTRIES = 2**24  # weights computed at once; 64 MiB in float32


def weights(q: Tensor, k: Tensor, scores: Scores, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (positions ``[t]``, causal softmax weights ``[H, t, S]``, float32 or wider) for pieces of the queries.

    Where a sink takes its share of the softmax, the weights of a query add up to less than 1.

    Args:
        q: rotated queries ``[1, H, T, D]``, the last T of the S tokens.
        k: rotated keys ``[1, H_kv, S, D]``.
        scores: how they are made of queries and keys, without a bias.
        queries: positions (0 to S - 1, among the last T) whose weights are wanted, ascending.
    """
    (heads, new), (kv_heads, total) = q.shape[1:3], k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    slots = torch.arange(total, device=q.device)
    keys = k[0].to(dtype).transpose(1, 2)  # [H_kv, D, S]
    for piece in pieces(len(queries), heads * total, ENTRIES):
        positions = queries[piece]
        some = q[0, :, positions - (total - new)].to(dtype).unflatten(0, (kv_heads, heads // kv_heads))
        found = (some.flatten(1, 2) @ keys * scores.scale).view(heads, len(positions), total)
        if scores.softcap is not None:
            found = scores.softcap * (found / scores.softcap).tanh()
        found = found.masked_fill_(slots > positions[:, None], float("-inf"))
        if scores.sinks is not None:
            sinks = scores.sinks.to(found)[:, None, None].expand(-1, len(positions), 1)
            found = torch.cat([found, sinks], -1)
        yield positions, found.softmax(-1)[..., :total]
