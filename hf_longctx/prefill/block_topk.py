"""``pattern: block_topk``: the key blocks whose mean key fits the mean query of a block best.

MInference's block-sparse pattern, arXiv:2407.02490.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..kernels.layout import BlockList
from ._blocks import BlockPattern, always_read, mean_pool, pieces, pooled_scores
from .base import BLOCK
from .vertical_slash import best


@dataclass(frozen=True)
class BlockTopk(BlockPattern):
    """Read the ``top_k`` best key blocks of each query block.

    Queries and keys are averaged per block, over the tokens that are there: the last block of a row may be short, and a
    chunk may bring a part of its first query block. The score of a key block is the product of the two means; the
    softmax over the blocks that the paper takes keeps their order. The sink block and the own block are read whatever
    their scores; one of them that is among the best uses up budget, the others come on top.

    Attributes:
        top_k: key blocks per query block.
    """

    top_k: int = field(default=100, metadata={"min": 1, "unit": "blocks"})

    @classmethod
    def select(cls, heads: Sequence[BlockTopk], q: Tensor, k: Tensor, scale: float) -> BlockList:
        kv_len, first = k.shape[2], k.shape[2] - q.shape[2]
        listed, queries, keys = always_read(q, k), mean_pool(q, first), mean_pool(k)
        batch, total, query_blocks, key_blocks = listed.shape
        budgets = cls.budgets(heads, "top_k", key_blocks, q.device)[:, None]
        for rows in pieces(query_blocks, batch * total * key_blocks):
            scores = pooled_scores(queries[:, :, rows], keys, scale, first // BLOCK + rows.start)
            listed[:, :, rows] |= best(scores, budgets)
        return BlockList.from_mask(listed, block=BLOCK, first=first, kv_len=kv_len)
