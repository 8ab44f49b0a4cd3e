"""``select: dense``: a decoded token reads every kept key."""

from __future__ import annotations

from dataclasses import dataclass

from .base import SelectSpec


@dataclass(frozen=True)
class Dense(SelectSpec):
    """Read every kept key."""

    roles = ("retrieval",)
    reads_all = True
