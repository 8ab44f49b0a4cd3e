"""From scores to what is kept: budgets alike for all heads, by head, by layer, or for the whole model.

A sequence is a list of layers, a layer a list of KV heads, a head the scores of its cached tokens ``[S]``: float32 or
wider, +inf for tokens that must stay. Of equal scores the first is kept: of the first head, in the first layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STEEPNESS = 20  # of a pyramid: the last layer has this part of the mean (PyramidKV, arXiv:2406.02069)

Heads = Sequence[Tensor]  # scores, or masks, of the KV heads of a layer


def top(scores: Tensor, count: int) -> Tensor:
    """Bool ``[S]``: the ``count`` highest, of equal ones the first."""
    keep = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    keep[scores.sort(descending=True, stable=True).indices[:count]] = True
    return keep


def uniform(heads: Heads, budget: int) -> list[Tensor]:
    """As many tokens in every head."""
    return [top(scores, budget) for scores in heads]


def by_head(heads: Heads, budget: int, floor: float) -> list[Tensor]:
    """As many tokens in all heads together, where the scores are highest; ``floor`` of its share in every head.

    AdaKV, arXiv:2407.11550. Heads may have different numbers of tokens, after an earlier eviction.
    """
    sure = [scores.masked_fill(top(scores, int(floor * min(budget, len(scores)))), float("inf")) for scores in heads]
    return list(top(torch.cat(sure), budget * len(heads)).split([len(scores) for scores in heads]))


def by_model(layers: Sequence[Heads], budget: int, floor: float) -> list[list[Tensor]]:
    """One threshold for all layers and heads (KVzip, arXiv:2505.23416)."""
    keep = by_head([scores for heads in layers for scores in heads], budget, floor)
    kept = iter(keep)
    return [[next(kept) for _ in heads] for heads in layers]


def pyramid(budget: int, protected: int, tokens: int, layers: int) -> list[int]:
    """Tokens of each layer's heads, evenly fewer from the first to the last; their mean is ``budget``.

    Args:
        protected: tokens that every head keeps.
        tokens: those there are.
    """
    free = max(0, budget - protected)
    most = max(0, tokens - protected)
    if layers == 1 or free >= most:
        return [min(budget, tokens)] * layers
    high = min(most, 2 * free - free / STEEPNESS)
    low = 2 * free - high
    exact = [high - layer * (high - low) / (layers - 1) for layer in range(layers)]
    # Rounded so that the sum stays: each layer takes what the ones before it have left over.
    found = []
    for layer in range(layers):
        found.append(round(sum(exact[: layer + 1])) - sum(found))
    return [protected + count for count in found]
