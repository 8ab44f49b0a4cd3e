"""How work is cut so that no temporary grows with the square of the prompt."""

from __future__ import annotations

from collections.abc import Iterator


def pieces(total: int, each: int, most: int) -> Iterator[slice]:
    """Slices of ``range(total)``: as many elements as ``most`` numbers allow where one costs ``each``, at least one."""
    step = max(1, most // max(1, each))
    return (slice(low, min(low + step, total)) for low in range(0, total, step))
