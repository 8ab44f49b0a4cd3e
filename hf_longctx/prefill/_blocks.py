"""What the patterns that score whole blocks share: pooling, pooled scores, and the blocks that are always read.

Shapes: ``NB`` blocks that some tokens touch, ``NQ`` query blocks that a chunk touches, ``NK`` key blocks of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .base import BLOCK, PatternSpec

TEMPORARY = 1 << 24  # scores held at a time


@dataclass(frozen=True)
class BlockPattern(PatternSpec):
    """A pattern whose unit is a block of keys.

    Attributes:
        block: tokens of a block, 64 in every pattern.
    """

    roles = ("retrieval",)

    block: int = field(default=BLOCK, kw_only=True, metadata={"unit": "tokens"})

    def __post_init__(self) -> None:
        if self.block != BLOCK:
            raise ConfigError(f"block: got {self.block}, supported: {BLOCK} tokens, the block of every pattern.")


def shares(heads: Sequence[PatternSpec], name: str, like: Tensor) -> Tensor:
    """The field ``name``, a share, of every head, ``[H, 1]`` in the dtype of ``like``."""
    return torch.tensor([getattr(head, name) for head in heads], dtype=like.dtype, device=like.device)[:, None]


def to_blocks(x: Tensor, first: int = 0) -> Tensor:
    """Tokens ``[B, H, T, D]``, at row positions from ``first`` on, as ``[B, H, NB, BLOCK, D]``; absent ones are 0."""
    return nn.functional.pad(x, (0, 0, first % BLOCK, -(first + x.shape[2]) % BLOCK)).unflatten(2, (-1, BLOCK))


def mean_pool(x: Tensor, first: int = 0) -> Tensor:
    """The mean of the tokens of each block, absent ones left out: ``[B, H, NB, D]``, float32 or wider."""
    blocks = to_blocks(x, first)
    sizes = torch.full((blocks.shape[2], 1), BLOCK, device=x.device)
    sizes[0] -= first % BLOCK
    sizes[-1] -= -(first + x.shape[2]) % BLOCK
    return blocks.sum(3, dtype=torch.promote_types(x.dtype, torch.float32)) / sizes


def pooled_scores(q: Tensor, k: Tensor, scale: float, low: int) -> Tensor:
    """Scores ``[B, H, N, NK]`` of N pooled query blocks, the first being block ``low`` of the row; -inf after each.

    q is ``[B, H, N, D]`` and k ``[B, n, NK, D]``, from ``mean_pool``.
    """
    folded = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, n, G * N, D]: a group reads its keys once
    scores = (folded @ k.transpose(-1, -2) * scale).unflatten(2, (-1, q.shape[2])).flatten(1, 2)
    i = torch.arange(low, low + q.shape[2], device=q.device)[:, None]
    return scores.masked_fill_(torch.arange(k.shape[2], device=q.device) > i, float("-inf"))


def pieces(total: int, each: int) -> Iterator[slice]:
    """Slices of ``range(total)``, each of at most ``TEMPORARY`` scores when one element costs ``each``."""
    step = max(1, TEMPORARY // each)
    return (slice(low, min(low + step, total)) for low in range(0, total, step))


def always_read(q: Tensor, k: Tensor) -> Tensor:
    """Bool ``[B, H, NQ, NK]``: the sink block, and the block that holds the queries themselves."""
    first, key_blocks = k.shape[2] - q.shape[2], -(-k.shape[2] // BLOCK)
    i = torch.arange(first // BLOCK, key_blocks, device=q.device)[:, None]
    j = torch.arange(key_blocks, device=q.device)
    return ((j == 0) | (j == i)).repeat(*q.shape[:2], 1, 1)


def cover(weights: Tensor, share: Tensor) -> Tensor:
    """Bool ``[..., N]``: the fewest of weights ``[..., N]`` that make up ``share`` (broadcastable) of their sum.

    Equal weights are taken from the lowest index; a share of 1 takes everything, weights of 0 too. What is left out is
    summed from the smallest weight up, because adding small weights to a large sum would lose them.
    """
    ranked, order = torch.sort(weights, dim=-1, descending=True, stable=True)
    rest = ranked.flip(-1).cumsum(-1).flip(-1)  # the sum of an entry and of all that are worse
    needed = (rest > (1 - share) * rest[..., :1]) | (share >= 1)
    return torch.zeros_like(needed).scatter_(-1, order, needed)
