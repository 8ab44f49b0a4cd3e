"""``pattern: sink_recent``: runs the store's own rule, so that prefill and decode of a streaming head agree."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..config.bounds import TOKENS_OR_NONE
from .base import PatternSpec


@dataclass(frozen=True)
class SinkRecent(PatternSpec):
    """Read what the streaming store's visibility rule names; its numbers are the store's.

    Attributes:
        dense_tail: so many of the last tokens that a forward of at least 128 adds to a sequence read all tokens of that
            forward before them as well.
    """

    roles = ("streaming",)
    store_rule = True

    dense_tail: int = field(default=0, metadata=TOKENS_OR_NONE)
