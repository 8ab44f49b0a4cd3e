"""Which tokens of a text belong to which of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError


def tokens_of(
    tokenizer: Any, text: str, parts: Sequence[tuple[int, int]], *, special: bool = True
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Token ids ``[T]`` (int64) of a text, and for each of its parts the tokens (first, end) that have a letter of it.

    A token that lies across a border belongs to both parts.

    Args:
        parts: (first, end) of characters, in any order.
        special: add the tokenizer's special tokens; not where a chat template wrote them.

    Raises:
        ConfigError: the tokenizer gives no offsets, or a part has no token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"tokenizer: {type(tokenizer).__name__} does not say which characters a token has (offsets). Load a fast "
            "one: AutoTokenizer.from_pretrained(..., use_fast=True)."
        )
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    offsets = torch.tensor(found["offset_mapping"]).view(-1, 2)
    spans = []
    for first, end in parts:
        inside = ((offsets[:, 0] < end) & (offsets[:, 1] > first)).nonzero()
        if first >= end or not len(inside):
            raise ConfigError(f"text: its part from character {first} to {end} has no token.")
        spans.append((int(inside[0]), int(inside[-1]) + 1))
    return torch.tensor(found["input_ids"], dtype=torch.int64), spans
