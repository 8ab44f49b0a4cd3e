"""The threads that torch computes with, for the native kernel to compute with.

torch's OpenMP threads wait for their next work without a rest, for milliseconds. Other threads would have to share the
cores with them: a prompt of 512 tokens took up to twice as long.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

import torch

MAPS = Path("/proc/self/maps")
STAT = Path("/proc/self/stat")
BEGUN = 19  # of STAT, behind the name: when the process began, in ticks since the machine did


def openmp_start() -> ctypes._CFuncPtr | None:
    """``GOMP_parallel`` of the OpenMP library that torch has loaded; None where there is none to be found.

    LLVM's and Intel's libraries have it as well as GNU's. A forked process gets None: it has none of the threads that
    its parent's library knows of.
    """
    folder = str(Path(torch.__file__).resolve().parent)
    try:
        if was_forked():
            return None
        lines = MAPS.read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux, or a sandbox
        return None
    files = {line[line.index("/") :] for line in lines if "/" in line}
    for path in sorted(file for file in files if file.startswith(folder) and "omp" in Path(file).name):
        with suppress(OSError, AttributeError):
            return ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY).GOMP_parallel
    return None


def was_forked() -> bool:
    """Whether this process began after the modules in it were imported, so in the middle of another one.

    Raises:
        OSError: the system does not say when it began.
    """
    record = logging.makeLogRecord({})
    imported = record.relativeCreated / 1000  # seconds since logging was, long before torch had threads
    begun = int(STAT.read_text(errors="replace").rpartition(")")[2].split()[BEGUN]) / os.sysconf("SC_CLK_TCK")
    return imported > time.clock_gettime(time.CLOCK_BOOTTIME) - begun + 0.1
