"""Huge pages of memory for what is read here and there: a page of 4 KB would cost a look at the page table for each.

Linux gives them where it is asked, as most systems are set up (``/sys/kernel/mm/transparent_hugepage/enabled`` is
``madvise``). Measured on two cores: a decoded token over chosen pages of 16 tokens is read 1.3 to 1.6 times faster.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import torch
from torch import Tensor

HUGE = 1 << 21  # bytes of a huge page
LEAST = 1 << 24  # bytes: what is smaller gains little, and its last page may be half empty
MADV_HUGEPAGE = 14


def in_huge_pages(x: Tensor) -> Tensor:
    """``x``, whose memory nobody wrote yet. Where it is large and on a CPU, Linux is asked for huge pages."""
    if torch.compiler.is_compiling():
        return x  # it has no memory yet
    if x.device.type == "cpu" and x.nbytes >= LEAST and (ask := _madvise()) is not None:
        first = -(-x.data_ptr() // HUGE) * HUGE
        end = (x.data_ptr() + x.nbytes) // HUGE * HUGE
        ask(first, end - first, MADV_HUGEPAGE)  # a wish: what comes of it changes nothing but speed
    return x


@cache
def _madvise() -> ctypes._CFuncPtr | None:
    """The system's function; None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
