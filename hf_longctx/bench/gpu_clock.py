"""Time on a CUDA device, and how fast it reads.

Times are the device's own, by its events, of one call that finds nothing of its data in the caches: before each, the
device sums a large buffer over and over, so that the call waits in its queue when its turn comes. What the processor
needs to make the call is not in them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Clock = Callable[[Callable[[], object]], float]  # the milliseconds that a call takes

AHEAD = 32  # sums before a timed call: some ten milliseconds, longer than a call takes to make
BUFFER = 1 << 30  # bytes of the buffer: more than the caches of a device hold


class DeviceClock:
    """Milliseconds that a call takes on the device."""

    def __init__(self, device: torch.device):
        self.buffer = torch.zeros(BUFFER // 4, device=device)

    def __call__(self, work: Callable[[], object]) -> float:
        for _ in range(AHEAD):
            self.buffer.sum()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def bandwidth(clock: Clock, buffer: Tensor) -> float:
    """GB/s at which the device reads ``buffer`` (a sum) or reads and writes it (a copy), whichever is faster."""
    other = torch.empty_like(buffer)
    size = buffer.numel() * buffer.element_size()
    rates = []
    for moved, work in ((size, buffer.sum), (2 * size, partial(other.copy_, buffer))):
        work()
        rates.append(moved / min(clock(work) for _ in range(5)) / 1e6)
    return max(rates)
