"""On what a benchmark ran: versions, processor, threads, and whether malloc is tuned."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from pathlib import Path

# Without these glibc maps fresh pages for every large tensor, and a growing torch.cat spends its time in page faults.
TUNED = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")


def retune() -> None:
    """Run this very command again with a tuned malloc, which glibc reads from the environment at start; once."""
    if any(os.environ.get(name) != value for name, value in TUNED.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **TUNED})


def malloc() -> str:
    """In words: which allocator, and the variables that tune it."""
    loaded = _read("/proc/self/maps")
    other = [name for name in ALLOCATORS if name in loaded]
    set_here = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("MALLOC_", "THP_")) or (name == "GLIBC_TUNABLES" and "malloc" in value)
    }
    words = ", ".join([*(f"{name} loaded" for name in other), *(f"{name}={value}" for name, value in set_here.items())])
    return f"tuned ({words})" if words else "not tuned"


class Busy:
    """How much of the processor other processes took since this was made: their share spoils every figure."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds all processors were busy, those of them that were ours, and the clock; None where it is not known."""
        first = _read("/proc/stat").partition("\n")[0].split()
        if first[:1] != ["cpu"]:
            return None
        user, nice, system, _, _, irq, softirq, steal = (float(field) for field in first[1:9])
        own = os.times()
        ticks = os.sysconf("SC_CLK_TCK")
        return (user + nice + system + irq + softirq + steal) / ticks, own.user + own.system, time.monotonic()

    def others(self) -> float | None:
        """Share of the time of all processors, 0 to 1."""
        now = self._now()
        if now is None or self.start is None:
            return None
        busy, own, wall = (b - a for a, b in zip(self.start, now, strict=True))
        return max(0.0, busy - own) / (max(wall, 1e-9) * (os.cpu_count() or 1))


def free_memory() -> int | None:
    """Bytes this process can still get, by the machine and by its control group; None where neither is known."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    bounds = [1024 * int(found[1])] if found else []
    for limit, used in (
        ("memory.max", "memory.current"),  # cgroup v2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        numbers = [_read(f"/sys/fs/cgroup/{name}").strip() for name in (limit, used)]
        if all(number.isdigit() for number in numbers):
            bounds.append(max(0, int(numbers[0]) - int(numbers[1])))
    return min(bounds, default=None)


def environment() -> dict[str, str | int]:
    """Versions and machine, as plain data."""
    import torch
    import transformers

    from .. import __version__

    return {
        "hf_longctx": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "malloc": malloc(),
    }


def _processor() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:  # not Linux
        return ""
