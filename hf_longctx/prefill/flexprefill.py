"""``pattern: flexprefill``: each head, prompt by prompt, reads lines or query-dependent blocks, as many as it needs.

FlexPrefill, arXiv:2502.20766.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from ..config.bounds import TOKENS
from ..layout.blocks import BlockList
from ._blocks import BlockPattern, always_read, best, cover, mean_pool, pooled_scores, query_pieces, shares
from .base import BLOCK
from .vertical_slash import LAST_QUERIES, line_sums


@dataclass(frozen=True)
class Flexprefill(BlockPattern):
    """Read what holds ``gamma`` of the estimated attention, estimated in the way that fits the head.

    The last 64 queries attend to all keys. Their true weights per key block are compared with an estimate, the softmax
    of mean query times mean keys per block. Where the two are close (square root of the Jensen-Shannon divergence, in
    nats, below ``tau``) the head is query-aware: the estimate is made for every query block of the chunk, and the
    fewest (query block, key block) pairs are read that hold ``gamma`` of it, all query blocks taken together. Elsewhere
    the true weights of the last 64 queries are summed per key and per band of 64 offsets i - j (offsets 0 to 63, 64 to
    127, ...), and the fewest keys (columns) and the fewest bands are read that hold ``gamma`` each; a band is read as
    the key blocks that it meets, one and the one before it.

    Every query block reads at least the blocks of ``min_budget`` tokens, as far as it has them: its best blocks, or
    those on the best bands that begin inside the prompt; a head of lines reads at least ``min_budget`` columns as well.
    The sink block and the own block are read whatever their weights; one of them that is among the best uses up budget,
    the others come on top. A prompt read in chunks is chosen for chunk by chunk.

    Attributes:
        gamma: share of the estimated attention; 1 reads everything.
        tau: distance below which a head is query-aware; 0 is never, 1 always.
        min_budget: tokens, rounded up to blocks.
    """

    gamma: float = field(default=0.95, metadata={"min": 0.0, "max": 1.0})
    tau: float = field(default=0.1, metadata={"min": 0.0, "max": 1.0})
    min_budget: int = field(default=1024, metadata=TOKENS)

    @classmethod
    def select(cls, heads: Sequence[Flexprefill], q: Tensor, k: Tensor, scale: float) -> BlockList:
        kv_len = k.shape[2]
        group = q.shape[1] // k.shape[1]
        first = kv_len - q.shape[2]
        keys = mean_pool(k)
        last = q[:, :, -LAST_QUERIES:]
        by_column, by_offset = line_sums(last, k, scale)
        gamma = shares(heads, "gamma", by_column)
        budgets = [head.min_budget for head in heads]
        columns = cover(by_column, gamma) | best(by_column, budgets)
        columns[..., :BLOCK] = False  # every query block lists the sink block
        aware = distance(by_column, last, keys, scale) < shares(heads, "tau", by_column)[:, 0]
        columns &= ~aware[..., None]
        bands = nn.functional.pad(by_offset, (0, -kv_len % BLOCK)).unflatten(2, (-1, BLOCK)).sum(-1)
        bands_kept = cover(bands, gamma)
        budgets = [-(-budget // BLOCK) for budget in budgets]

        def parts() -> Iterator[tuple[slice, slice, Tensor]]:
            for some_aware, mine in _runs(aware.any(0).tolist()):
                where = aware[:, mine, None, None]
                if some_aware:
                    queries = mean_pool(q[:, mine], first)
                    own_keys = keys[:, mine.start // group, None]
                    pairs = best_pairs(pooled_scores(queries, own_keys, scale), gamma[mine], budgets[mine])
                for rows, seen in query_pieces(q[:, mine], k):
                    listed = on_bands(bands[:, mine, :seen], bands_kept[:, mine, :seen], budgets[mine], rows)
                    listed = pairs[:, :, rows, :seen].where(where, listed) if some_aware else listed
                    yield mine, rows, listed | always_read(*listed.shape[2:], q.device)

        shape = (q.shape[0], len(heads))
        return BlockList.from_parts(parts(), columns, shape=shape, block=BLOCK, first=first, kv_len=kv_len)


def distance(by_column: Tensor, q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Square root of the Jensen-Shannon divergence of true and estimated weights per key block, ``[B, H]``.

    by_column ``[B, H, S]`` are the sums of the true weights of q ``[B, H, L, D]``; keys ``[B, n, NK, D]`` are means.
    """
    means = q.mean(2, keepdim=True, dtype=keys.dtype)
    guess = pooled_scores(means, keys, scale)[:, :, 0].softmax(-1)
    true = nn.functional.pad(by_column, (0, -by_column.shape[2] % BLOCK)).unflatten(2, (-1, BLOCK)).sum(-1) / q.shape[2]
    middle = ((true + guess) / 2).clamp(min=torch.finfo(true.dtype).tiny)  # not 0 where both underflow
    parts = (torch.special.xlogy(p, p / middle).sum(-1) for p in (true, guess))
    return (sum(parts) / 2).clamp(min=0).sqrt()


def best_pairs(scores: Tensor, gamma: Tensor, budgets: Sequence[int]) -> Tensor:
    """Bool ``[B, H, NQ, NK]``: the best pairs of scores of that shape, and the best key blocks of each query block."""
    return cover(scores.softmax(-1).flatten(2), gamma).view_as(scores) | best(scores, budgets)


def on_bands(bands: Tensor, kept: Tensor, budgets: Sequence[int], rows: slice) -> Tensor:
    """Bool ``[B, H, N, NK]``: the key blocks on the kept bands of offsets, and on the best ones of each query block.

    bands and kept are ``[B, H, NK]``; the query blocks ``rows`` are the last N of the NK blocks.
    """
    key_blocks = bands.shape[2]
    i = torch.arange(key_blocks - (rows.stop - rows.start), key_blocks, device=bands.device)[:, None]
    j = torch.arange(key_blocks, device=bands.device)
    near = bands[:, :, None].masked_fill(j > i, float("-inf"))  # the other bands begin before the prompt
    chosen = kept[:, :, None] | best(near, budgets)
    chosen[..., 1:] |= chosen[..., :-1].clone()  # band a leads from block i into blocks i - a and i - a - 1
    return chosen.gather(-1, (i - j).clamp(min=0).expand_as(chosen))


def _runs(aware: list[bool]) -> Iterator[tuple[bool, slice]]:
    """Neighbouring heads none of which is query-aware together; query-aware ones alone, their pairs take memory."""
    for some, run in groupby(range(len(aware)), aware.__getitem__):
        heads = list(run)
        yield from ((True, slice(h, h + 1)) for h in heads) if some else [(False, slice(heads[0], heads[-1] + 1))]
