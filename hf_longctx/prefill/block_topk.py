"""``pattern: block_topk``: the key blocks whose mean key fits the mean query of a block best.

MInference's block-sparse pattern, arXiv:2407.02490.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..config.bounds import COUNT
from ..layout.blocks import BlockList
from ._blocks import BlockPattern, always_read, best, mean_pool, pooled_scores, query_pieces
from .base import BLOCK


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

    top_k: int = field(default=100, metadata={**COUNT, "unit": "blocks"})

    @classmethod
    def select(cls, heads: Sequence[BlockTopk], q: Tensor, k: Tensor, scale: float) -> BlockList:
        kv_len = k.shape[2]
        first = k.shape[2] - q.shape[2]
        queries = mean_pool(q, first)
        keys = mean_pool(k)
        budgets = [head.top_k for head in heads]

        def parts() -> Iterator[tuple[slice, slice, Tensor]]:
            for rows, seen in query_pieces(q, k):
                scores = pooled_scores(queries[:, :, rows], keys[:, :, :seen], scale)
                yield slice(0, len(heads)), rows, best(scores, budgets) | always_read(*scores.shape[2:], q.device)

        return BlockList.from_parts(parts(), shape=queries.shape[:2], block=BLOCK, first=first, kv_len=kv_len)
