"""The threads that torch computes with, for the native kernel to compute with.

torch's OpenMP threads wait for their next work without a rest, for milliseconds. Other threads would have to share the
cores with them: a prompt of 512 tokens took up to twice as long.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import torch

_IMPORTED_BY = os.getpid()
MAPS = Path("/proc/self/maps")


def openmp_start() -> ctypes._CFuncPtr | None:
    """``GOMP_parallel`` of the OpenMP library that torch has loaded; None where there is none to be found.

    LLVM's and Intel's libraries have it as well as GNU's. A process that was forked after this module was imported gets
    None: it has none of the threads that its parent's library knows of.
    """
    if os.getpid() != _IMPORTED_BY or not MAPS.exists():
        return None
    folder = str(Path(torch.__file__).resolve().parent)
    try:
        lines = MAPS.read_text(errors="surrogateescape").splitlines()
    except OSError:  # a sandbox
        return None
    files = {line[line.index("/") :] for line in lines if "/" in line}
    for path in sorted(file for file in files if file.startswith(folder) and "omp" in Path(file).name):
        with suppress(OSError, AttributeError):
            return ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY).GOMP_parallel
    return None
