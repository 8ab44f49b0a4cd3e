"""The streaming rule over a paged KV cache, in torch: which slots a step reads is planned once, for all heads.

``kv_cache`` is ``[blocks, KV heads, tokens of a block, 2 * head_dim]``, keys before values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

QUERIES = 256  # of a request that are attended at once: each reads the window and at most so many keys more


class Rule(NamedTuple):
    """A query at position i sees the keys of positions j <= i that are below ``sink``, or of the ``recent`` up to i."""

    sink: int
    recent: int


@dataclass(frozen=True)
class Piece:
    """Stretches of equally many queries, each of one request.

    Attributes:
        tokens: ``[stretches, queries]``, where the queries stand in the step.
        blocks: ``[stretches, keys]``, the blocks of the keys.
        offsets: ``[stretches, keys]``, where in their blocks the keys stand.
        mask: ``[stretches, 1, queries, keys]``, which keys a query sees.
    """

    tokens: Tensor
    blocks: Tensor
    offsets: Tensor
    mask: Tensor


def plan(starts: Tensor, lengths: Tensor, block_table: Tensor, block: int, rule: Rule) -> tuple[Piece, ...]:
    """What the requests of a step read.

    Args:
        starts: ``[requests + 1]``, where the queries of each request begin in the step.
        lengths: ``[requests]``, tokens of each request, those of this step among them.
        block_table: ``[requests, blocks]``; only entries of blocks that hold a visible key are looked at.
        block: tokens of a block.
        rule: which keys a query sees.
    """
    stretches: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    bounds = starts.tolist()
    for request, length in enumerate(lengths.tolist()):
        start, new = bounds[request], bounds[request + 1] - bounds[request]
        for done in range(0, new, QUERIES):
            stretches[min(QUERIES, new - done)].append((request, start + done, length - new + done))
    return tuple(_piece(rows, queries, block_table, block, rule) for queries, rows in stretches.items())


def _piece(rows: Sequence[tuple[int, int, int]], queries: int, block_table: Tensor, block: int, rule: Rule) -> Piece:
    request, token, first = torch.tensor(rows, device=block_table.device).unbind(1)
    step = torch.arange(queries, device=block_table.device)
    last = first + queries - 1
    low = (first - rule.recent + 1).clamp(min=rule.sink)  # the first key behind the sinks that any query sees
    sinks = min(rule.sink, int(last.max()) + 1)
    keys = torch.arange(sinks + max(0, int((last - low).max()) + 1), device=block_table.device)
    at = torch.where(keys < sinks, keys, keys - sinks + low[:, None])  # positions [stretches, keys]
    query = (first[:, None] + step)[:, :, None]
    mask = (at[:, None] <= query) & ((at[:, None] < rule.sink) | (query - at[:, None] < rule.recent))
    at = at.minimum(last[:, None])  # what is beyond is masked, and may not be in a block
    blocks = block_table[request[:, None], at // block].long()
    return Piece(token[:, None] + step, blocks, at % block, mask[:, None])


def attend(query: Tensor, kv_cache: Tensor, pieces: Sequence[Piece], scale: float, out: Tensor) -> None:
    """Write the attention of ``query`` ``[tokens, query heads, head_dim]`` to ``out``, which has its shape."""
    heads = kv_cache.shape[1]
    for piece in pieces:
        k, v = kv_cache[piece.blocks, :, piece.offsets].transpose(1, 2).chunk(2, -1)  # [stretches, heads, keys, D]
        q = (
            query[piece.tokens].unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)
        )  # [stretches, heads, group, queries, D]
        mask = piece.mask.repeat(1, 1, q.shape[2], 1)
        read = torch.nn.functional.scaled_dot_product_attention(q.flatten(2, 3), k, v, mask, scale=scale)
        out[piece.tokens] = read.view_as(q).permute(0, 3, 1, 2, 4).flatten(2, 3)


def write(kv_cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Put the new tokens' ``key`` and ``value``, both ``[tokens, KV heads, head_dim]``, into their slots.

    Args:
        slots: ``[tokens]``, block * tokens of a block + offset; -1 for what is padding.
    """
    new = torch.cat([key, value], -1)[: len(slots)]
    real = slots >= 0
    block = kv_cache.shape[2]
    kv_cache[slots[real] // block, :, slots[real] % block] = new[real]
