"""How likely tokens were, from the hidden states that predict them, without all logits at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

LOGITS = 1 << 24  # logits computed at once: 64 MB in float32


def losses_of(head: Callable[[Tensor], Tensor], states: Tensor, ids: Tensor, vocab: int) -> Tensor:
    """The negative log-likelihoods, float32 ``[A]``, of ``ids [A]``, which hidden states ``[A, D]`` predict.

    Args:
        head: as `output_head` gives it.
        vocab: logits of a token.
    """
    rows = max(1, LOGITS // vocab)
    losses = []
    for some, right in zip(states.split(rows), ids.split(rows), strict=True):
        logits = head(some).float()
        losses.append(cross_entropy(logits, right.long().to(logits.device), reduction="none").to(ids.device))
    return torch.cat(losses)
