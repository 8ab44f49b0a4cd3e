"""``pin``: the pass key, under another word."""

from __future__ import annotations

from dataclasses import dataclass

from .passkey import Passkey


@dataclass(frozen=True)
class Pin(Passkey):
    """A pass key by another name."""
