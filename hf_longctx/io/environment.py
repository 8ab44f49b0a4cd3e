"""On what something was measured: versions, processor, threads, and whether malloc is tuned."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")


def environment() -> dict[str, str | int]:
    """Versions and machine, as plain data."""
    import torch

    return {
        "hf_longctx": sys.modules["hf_longctx"].__version__,  # not imported: the package imports what asks for this
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "cpu": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "malloc": malloc(),
    }


def malloc() -> str:
    """In words: which allocator, and the variables that tune it."""
    loaded = read("/proc/self/maps")
    other = [name for name in ALLOCATORS if name in loaded]
    set_here = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("MALLOC_", "THP_")) or (name == "GLIBC_TUNABLES" and "malloc" in value)
    }
    words = ", ".join([*(f"{name} loaded" for name in other), *(f"{name}={value}" for name, value in set_here.items())])
    return f"tuned ({words})" if words else "not tuned"


def read(path: str) -> str:
    """What a file of /proc says; nothing where there is none."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:  # not Linux
        return ""


def _processor() -> str:
    for line in read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
