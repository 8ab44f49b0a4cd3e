"""``hf-longctx say-hello``."""

from __future__ import annotations

from ..io.console import console


def command(name: str = "you") -> None:
    """Greet somebody."""
    console().print(f"Hello, {name}.")
