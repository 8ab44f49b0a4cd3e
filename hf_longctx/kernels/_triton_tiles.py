"""What the Triton kernels share: a tile loaded, one step of the online softmax, and the launch settings.

Scores are kept in base 2 (callers multiply their scale by `LOG2E`): the device computes exp2, not exp.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)
LN2 = math.log(2)
# what the interpreter is told a device has
CPU_UNITS = 4
CPU_SHARED = 1 << 17


@triton.jit
def load_tile(base, rows, row_stride, col_stride, valid, DIM: tl.constexpr, COLS: tl.constexpr):
    """The rows ``rows`` of a matrix of ``DIM`` columns, ``[len(rows), COLS]``, 0 where ``valid`` (None: all) is not."""
    cols = tl.arange(0, COLS)
    places = base + rows[:, None] * row_stride + cols[None, :] * col_stride
    if valid is None and DIM == COLS:
        tile = tl.load(places)
    elif valid is None:
        tile = tl.load(places, mask=cols[None, :] < DIM, other=0.0)
    else:
        tile = tl.load(places, mask=valid[:, None] & (cols[None, :] < DIM), other=0.0)
    return tile


@triton.jit
def scores_of(queries, keys, scale):
    """Scaled scores ``[rows, keys]`` in float32; float32 inputs are not rounded to TF32."""
    return tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale


@triton.jit
def softmax_step(top, total, out, scores, values):
    """The running maximum, sum and weighted values of each row after a tile of scores, which are -inf where hidden."""
    new = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf is NaN
    weights = tl.exp2(scores - finite[:, None])
    keep = tl.exp2(top - finite)
    total = total * keep + tl.sum(weights, 1)
    out = tl.dot(weights.to(values.dtype), values, acc=out * keep[:, None], input_precision="ieee")
    return new, total, out


@triton.jit
def store_part(
    part_out,
    part_lse,
    top,
    total,
    acc,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    COLS: tl.constexpr,
):
    """Write the result of a work item of decoding: normalised out ``[GROUP, DIM]``, and lse ``[GROUP]`` in base 2."""
    sees = total > 0
    acc = acc / tl.where(sees, total, 1.0)[:, None]
    member = tl.arange(0, GROUP_ROWS)
    cols = tl.arange(0, COLS)
    mask = (member < GROUP)[:, None] & (cols < DIM)[None, :]
    tl.store(part_out + member[:, None] * DIM + cols[None, :], acc, mask=mask)
    lse = tl.where(sees, top + tl.log2(tl.where(sees, total, 1.0)), float("-inf"))
    tl.store(part_lse + member, lse, mask=member < GROUP)


@triton.jit
def rank(places, count, x, steps):
    """How many of the ``count`` ascending numbers at ``places`` lie below ``x`` (a number or a vector).

    ``steps`` is at least the bit length of ``count``.
    """
    low = x * 0
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        search = low < high
        below = search & (tl.load(places + middle, mask=search, other=0) < x)
        low = tl.where(below, middle + 1, low)
        high = tl.where(search & (below == 0), middle, high)
    return low


def units(device: torch.device) -> int:
    """Multiprocessors of the device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else CPU_UNITS


def settings(q: Tensor, rows: int, keys: int) -> dict[str, int]:
    """Warps, and stages of tiles in flight, of a program that reads ``keys`` keys and values a step for ``rows`` rows.

    As many as let two programs share a multiprocessor, at most 3; fewer than 2 only where no more fit at all.
    """
    width = triton.next_power_of_2(q.shape[-1]) * q.element_size()
    shared = CPU_SHARED
    if q.device.type == "cuda":
        shared = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
    return settings_for(width, rows, keys, shared)


def settings_for(width: int, rows: int, keys: int, shared: int) -> dict[str, int]:
    """`settings` for rows of ``width`` bytes and ``shared`` bytes of shared memory."""
    stage = 2 * keys * width
    stages = min(3, (shared // 2 - rows * width) // stage)
    if stages < 2:
        stages = max(1, min(2, (shared - rows * width) // stage))
    return {"num_warps": 8 if width >= 512 else 4, "num_stages": stages}
