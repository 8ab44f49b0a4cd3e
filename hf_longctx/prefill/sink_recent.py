"""``pattern: sink_recent``: runs the store's own rule, so that prefill and decode of a streaming head agree."""

from __future__ import annotations

from dataclasses import dataclass

from .base import PatternSpec


@dataclass(frozen=True)
class SinkRecent(PatternSpec):
    """Read what the streaming store's visibility rule names; its numbers are the store's."""

    roles = ("streaming",)
    store_rule = True
