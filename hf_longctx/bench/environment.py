"""What a benchmark needs of its machine: a tuned malloc, and to know how busy it was; what it ran on."""

from __future__ import annotations

import os
import re
import sys
import time

from ..io.environment import environment as environment
from ..io.environment import malloc as malloc
from ..io.environment import read as _read

# Without these glibc maps fresh pages for every large tensor, and a growing torch.cat spends its time in page faults.
TUNED = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def retune() -> None:
    """Run this very command again with a tuned malloc, which glibc reads from the environment at start; once."""
    if any(os.environ.get(name) != value for name, value in TUNED.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **TUNED})


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
