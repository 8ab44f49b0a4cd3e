"""Attention weights of observed layers, by pieces of queries: no matrix of all queries and keys is ever kept.

And ``read``, by which texts are read on top of a context that is read once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.seam import CACHE, cache_of
from ..layout.pieces import pieces
from ..layout.scores import Scores
from ..model.modules import language_model
from ..model.observe import observe

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


def read(model: nn.Module, ids: Tensor, cache: Any = None, look: Callable | None = None) -> Any:
    """The cache after reading ``ids`` ``[1, T]`` on top of what ``cache`` holds, which stays as it is.

    Args:
        model: patched.
        cache: what this function gave for the text before, or None.
        look: an observer of the layers.
    """
    with observe(model, look or (lambda *call: None)):
        return cache_of(language_model(model)(ids, **{CACHE: copy.deepcopy(cache)}, use_cache=True))
