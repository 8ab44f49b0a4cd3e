"""``kernel: textbook``: the definition of attention."""

from __future__ import annotations

from ..layout.reads import All, Causal
from . import reference

NAME = "textbook"
PREFERENCE = 1
READS = frozenset({All, Causal})


def supports(case) -> str | None:
    return reference.supports(case)


def attend(q, segments, reads, scores, want_lse=True):
    return reference.attend(q, segments, reads, scores, want_lse)
