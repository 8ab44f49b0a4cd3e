"""What the patterns that score whole blocks share: pooling, pooled scores, and the blocks that are always read.

Shapes: ``NB`` blocks that some tokens touch, ``NQ`` query blocks that a chunk touches, ``NK`` key blocks of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..layout.pieces import pieces
from .base import BLOCK, PatternSpec

# Numbers per temporary of a selection, where these least steps do not need more: a number per head and key (H * S), the
# last 64 queries of a head (64 * S), the tokens of a head (S * D), for flexprefill the pairs of blocks of a head.
TEMPORARY = 1 << 20


@dataclass(frozen=True)
class BlockPattern(PatternSpec):
    """A pattern whose unit is a block of keys.

    Attributes:
        block: tokens of a block, 64 in every pattern.
    """

    roles = ("retrieval",)

    block: int = field(default=BLOCK, kw_only=True, metadata={"choices": (BLOCK,), "unit": "tokens"})

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
    dtype = torch.promote_types(x.dtype, torch.float32)
    size = x.shape[2]
    lead = min(-first % BLOCK, size)
    cuts = (0, lead, size - (size - lead) % BLOCK, size)  # a block that begins earlier, whole ones, one that ends later
    parts = []
    for low, high in zip(cuts, cuts[1:], strict=False):
        if low < high:
            whole = x[:, :, low:high].unflatten(2, (-1, min(BLOCK, high - low)))
            # A sum of low precision copies what it adds up.
            some = (whole[:, heads].mean(3, dtype=dtype) for heads in head_pieces(x))
            parts.append(torch.cat(list(some), 1))
    return torch.cat(parts, 2)


def head_pieces(x: Tensor) -> Iterator[slice]:
    """Heads of ``[B, H, T, D]``, as many at a time as may be copied."""
    return pieces(x.shape[1], x.shape[0] * x.shape[2] * x.shape[3], TEMPORARY)


def query_pieces(q: Tensor, k: Tensor) -> Iterator[tuple[slice, int]]:
    """(query blocks of the chunk, key blocks up to the last of them), for scores per block of all heads of q."""
    past = (k.shape[2] - q.shape[2]) // BLOCK
    key_blocks = -(-k.shape[2] // BLOCK)
    cut = pieces(key_blocks - past, q.shape[0] * q.shape[1] * key_blocks, TEMPORARY)
    return ((rows, past + rows.stop) for rows in cut)


def pooled_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scores ``[B, H, N, NK]`` of the last N query blocks of NK key blocks; -inf after each.

    q is ``[B, H, N, D]`` and k ``[B, n, NK, D]``, from ``mean_pool``.
    """
    folded = (q * scale).unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, n, G * N, D]: a group reads its keys once
    scores = (folded @ k.transpose(-1, -2)).unflatten(2, (-1, q.shape[2])).flatten(1, 2)
    return scores.masked_fill_(_later(q.shape[2], k.shape[2], q.device), float("-inf"))


def _later(query_blocks: int, key_blocks: int, device: torch.device) -> Tensor:
    """Bool ``[N, NK]``: the key blocks after each of the last query blocks."""
    i = torch.arange(key_blocks - query_blocks, key_blocks, device=device)[:, None]
    return torch.arange(key_blocks, device=device) > i


def always_read(query_blocks: int, key_blocks: int, device: torch.device) -> Tensor:
    """Bool ``[N, NK]``: the sink block, and the own block of each of the last query blocks."""
    i = torch.arange(key_blocks - query_blocks, key_blocks, device=device)[:, None]
    j = torch.arange(key_blocks, device=device)
    return (j == 0) | (j == i)


def best(sums: Tensor, budgets: Sequence[int]) -> Tensor:
    """Bool like sums ``[B, H, ..., N]``: the ``budgets[h]`` largest of them, equal ones from the lowest index."""
    size = sums.shape[-1]
    least = torch.full_like(sums[..., :1], float("-inf"))  # the worst that may be chosen
    for budget in {own for own in budgets if own < size}:
        heads = [h for h, own in enumerate(budgets) if own == budget]
        some = sums if len(heads) == len(budgets) else sums[:, heads]
        least[:, heads] = some.topk(budget, sorted=False).values.amin(-1, keepdim=True)
    most = torch.tensor([min(own, size) for own in budgets], device=sums.device)
    return _down_to(sums, least, most.view(-1, *[1] * (sums.dim() - 2)))


def _down_to(sums: Tensor, least: Tensor, count: Tensor) -> Tensor:
    """Bool ``[..., N]``: what is above ``least [..., 1]``, and of its equals the first, ``count`` in all."""
    above = sums > least
    equal = sums == least
    left = count - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= left))


def cover(weights: Tensor, share: Tensor) -> Tensor:
    """Bool ``[..., N]``: the fewest of weights ``[..., N]`` that make up ``share`` (broadcastable) of their sum.

    Equal weights are taken from the lowest index; a share of 1 takes everything, weights of 0 too. What is left out is
    summed from the smallest weight up, because adding small weights to a large sum would lose them.
    """
    ranked = torch.sort(weights, dim=-1, descending=True).values
    rest = ranked.flip(-1).cumsum(-1).flip(-1)  # the sum of an entry and of all that are worse
    count = ((rest > (1 - share) * rest[..., :1]) | (share >= 1)).sum(-1, keepdim=True)
    least = ranked.gather(-1, (count - 1).clamp(min=0))
    return _down_to(weights, least, count)
