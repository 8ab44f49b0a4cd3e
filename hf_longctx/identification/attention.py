"""Attention weights of observed layers, by pieces of queries: no matrix of all queries and keys is ever kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..layout.pieces import pieces

ENTRIES = 2**24  # weights computed at once; 64 MiB in float32


def weights(q: Tensor, k: Tensor, scaling: float, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (positions ``[t]``, causal softmax weights ``[H, t, S]``, float32 or wider) for pieces of the queries.

    Args:
        q: rotated queries ``[1, H, T, D]``, the last T of the S tokens.
        k: rotated keys ``[1, H_kv, S, D]``.
        queries: positions (0 to S - 1, among the last T) whose weights are wanted, ascending.
    """
    (heads, new), (kv_heads, total) = q.shape[1:3], k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    slots = torch.arange(total, device=q.device)
    keys = k[0].to(dtype).transpose(1, 2)  # [H_kv, D, S]
    for piece in pieces(len(queries), heads * total, ENTRIES):
        positions = queries[piece]
        some = q[0, :, positions - (total - new)].to(dtype).unflatten(0, (kv_heads, heads // kv_heads))
        scores = (some.flatten(1, 2) @ keys * scaling).view(heads, len(positions), total)
        scores = scores.masked_fill_(slots > positions[:, None], float("-inf"))
        yield positions, scores.softmax(-1)
