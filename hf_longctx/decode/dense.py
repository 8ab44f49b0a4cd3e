"""``select: dense``: a decoded token reads every cached key."""

from __future__ import annotations

from dataclasses import dataclass

from .base import SelectSpec


@dataclass(frozen=True)
class Dense(SelectSpec):
    """Read every cached key."""

    roles = ("retrieval",)
    reads_all = True
