"""Rotary positions whose angles depend on the length of the text: what a filled cache may still be continued by."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedModeError
from ..layout.rows import Rows

BY_LENGTH = ("dynamic", "longrope")  # the rope types of Transformers whose angles depend on the length


def length_limit(config: Any) -> tuple[str, int] | None:
    """(rope type, tokens up to which its angles are always the same) of a Transformers config; None: at any length."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention") or rope
    kind = rope.get("rope_type", "default")
    if not any(name in kind for name in BY_LENGTH):
        return None
    limit = rope.get("original_max_position_embeddings") if kind == "longrope" else None
    return kind, limit or config.max_position_embeddings


def check_rotary(config: Any, rows: Rows) -> str | None:
    """A note for the report where one token goes on over keys that were turned by other angles than its own.

    Transformers does so as well when it decodes. A forward of several tokens is what would make the answer depend on
    how a text was cut.

    Raises:
        UnsupportedModeError: it brings several.
    """
    if not rows.past or (found := length_limit(config)) is None:
        return None
    kind, limit = found
    pads = min(rows.starts or (0,))
    past = rows.past - pads
    total = rows.total - pads
    same = total <= limit or past <= 0 or (kind == "longrope" and past > limit)
    if same:
        return None
    if rows.new > 1:
        raise UnsupportedModeError(
            f"rope_type '{kind}': beyond {limit} tokens this model turns keys by angles that depend on the length of "
            f"the text. The cache holds {past} tokens, and this forward goes on to {total}: the answer would not be "
            "that of the whole text. Read the text in one forward (without prefill_chunk_size, a filled cache or "
            "drafts), or keep it within that length."
        )
    return (
        f"rope_type {kind}: decoding went beyond {limit} tokens, where new keys are turned by other angles than the "
        "cached ones (in Transformers as well)"
    )
