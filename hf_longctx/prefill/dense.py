"""``pattern: dense``: every query block reads every key block up to itself."""

from __future__ import annotations

from dataclasses import dataclass

from .base import PatternSpec


@dataclass(frozen=True)
class Dense(PatternSpec):
    """Read every visible key."""

    roles = ("retrieval",)
