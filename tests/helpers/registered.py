"""What a test registers is forgotten after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hf_longctx.config.words import registered


@contextmanager
def nothing_kept() -> Iterator[None]:
    """What is registered inside is forgotten on exit."""
    before = {folder: dict(words) for folder, words in registered.items()}
    try:
        yield
    finally:
        for folder, words in before.items():
            registered[folder].clear()
            registered[folder].update(words)
