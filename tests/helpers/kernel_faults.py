"""Kernels that compute something else for one class of reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def change_attend(monkeypatch: Any, kernel: Any, reads_class: type, change: Callable) -> None:
    """``kernel.attend`` gets what ``change(q, segments, reads)`` gives, where the reads are of this class."""
    right = kernel.attend

    def attend(q, segments, reads, scores, want_lse=True):
        if isinstance(reads, reads_class):
            q, segments, reads = change(q, segments, reads)
        return right(q, segments, reads, scores, want_lse)

    monkeypatch.setattr(kernel, "attend", attend)
