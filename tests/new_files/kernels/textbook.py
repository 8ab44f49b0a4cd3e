"""``kernel: textbook``: the definition of attention."""

from __future__ import annotations

from . import reference

NAME, PREFERENCE, READS = "textbook", 1, reference.READS


def supports(case) -> str | None:
    return reference.supports(case)


def attend(q, segments, reads, scores, want_lse=True):
    return reference.attend(q, segments, reads, scores, want_lse)
