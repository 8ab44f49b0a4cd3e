"""Triton kernel of decode over packed keys and values (`_quantized.py`), unpacked tile by tile in registers.

Its work items lie beside those of `_triton_decode`, whose second launch merges what both found.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ._quantized import Quantised
from ._triton_tiles import LOG2E, load_tile, scores_of, softmax_step, store_part

KEYS = 64  # keys of a tile, at most


@triton.jit
def _unpacked(codes, rows, row_stride, valid, DIM: tl.constexpr, COLS: tl.constexpr, BITS: tl.constexpr):
    """The codes of the rows ``rows`` as float32 ``[len(rows), COLS]``; of 4 bits, two channels a byte."""
    cols = tl.arange(0, COLS)
    places = cols
    shift = cols * 0
    if BITS == 4:
        places = tl.where(cols < DIM // 2, cols, cols - DIM // 2)
        shift = tl.where(cols < DIM // 2, 0, 4)
    mask = valid[:, None] & (cols < DIM)[None, :]
    found = tl.load(codes + rows[:, None] * row_stride + places[None, :], mask=mask, other=0).to(tl.int32)
    if BITS == 4:
        found = (found >> shift[None, :]) & 15
    return found.to(tl.float32)


@triton.jit
def _item(
    queries,
    piece,
    strides,
    row,
    local,
    low,
    longest,
    chunk,
    scale,
    part_out,
    part_lse,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    COLS: tl.constexpr,
    KEYS: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The keys ``low .. low + chunk`` of one KV head of one piece: normalised out ``[G, D]`` and lse ``[G]``."""
    k, k_scale, v, v_scale, lengths = piece
    k_strides, k_scale_strides, v_strides, v_scale_strides = strides
    end = longest
    if lengths is not None:
        end = tl.minimum(tl.load(lengths + row).to(tl.int32), longest)
    end = tl.minimum(end, low + chunk)
    k += row * k_strides[0] + local * k_strides[1]
    k_scale += row * k_scale_strides[0] + local * k_scale_strides[1]
    v += row * v_strides[0] + local * v_strides[1]
    v_scale += row * v_scale_strides[0] + local * v_scale_strides[1]
    slots = tl.arange(0, KEYS)
    cols = tl.arange(0, COLS)
    top = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_ROWS], tl.float32)
    acc = tl.zeros([GROUP_ROWS, COLS], tl.float32)
    for start in range(low, end, KEYS):  # a tile lies in one group of tokens
        far = tl.cast(start, tl.int64)
        valid = start + slots < end
        steps = k_scale + far // TOKENS * k_scale_strides[2]
        step = tl.load(steps + cols, mask=cols < DIM, other=0.0).to(tl.float32)
        least = tl.load(steps + k_scale_strides[3] + cols, mask=cols < DIM, other=0.0).to(tl.float32)
        keys = _unpacked(k + far * k_strides[2], slots, k_strides[2], valid, DIM, COLS, BITS)
        keys = (least[None, :] + keys * step[None, :]).to(queries.dtype)
        scores = tl.where(valid[None, :], scores_of(queries, keys, scale), float("-inf"))
        steps = v_scale + (far + slots) * v_scale_strides[2]
        step = tl.load(steps, mask=valid, other=0.0).to(tl.float32)
        least = tl.load(steps + 1, mask=valid, other=0.0).to(tl.float32)
        values = _unpacked(v + far * v_strides[2], slots, v_strides[2], valid, DIM, COLS, BITS)
        values = (least[:, None] + values * step[:, None]).to(queries.dtype)
        top, total, acc = softmax_step(top, total, acc, scores, values)
    store_part(part_out, part_lse, top, total, acc, GROUP, GROUP_ROWS, DIM, COLS)


@triton.jit(do_not_specialize=["chunk"])
def packed_kernel(
    q,
    order,
    outs,
    lses,
    pieces,
    strides,
    numbers,
    q_strides,
    chunk,
    scale,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    COLS: tl.constexpr,
    KEYS: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One work item. Grid (items, B). ``numbers`` and the slots of the results: as in `_triton_decode`."""
    item = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    for s in tl.static_range(len(pieces)):
        first = numbers[s][0] // 16
        splits = numbers[s][1] // 16
        heads = numbers[s][2] // 16
        if (item >= first) & (item < first + heads * splits):
            local = (item - first) // splits
            split = (item - first) % splits
            head = tl.load(order + numbers[s][3] // 16 + local)
            member = tl.arange(0, GROUP_ROWS)
            query_rows = q + row * q_strides[0] + head * GROUP * q_strides[1]
            queries = load_tile(query_rows, member, q_strides[1], q_strides[3], member < GROUP, DIM, COLS)
            base = numbers[s][5] // 16
            width = numbers[s][6] // 16
            place = numbers[s][7] // 16
            slot = base + (row * heads + local) * width + place + split
            _item(
                queries,
                pieces[s],
                strides[s],
                row,
                local.to(tl.int64),
                split * chunk,
                numbers[s][4] // 16,
                chunk,
                scale,
                outs + slot * GROUP * DIM,
                lses + slot * GROUP,
                GROUP,
                GROUP_ROWS,
                DIM,
                COLS,
                KEYS,
                BITS,
                TOKENS,
            )


def launch(
    grid: tuple[int, int],
    tensors: tuple[Tensor, ...],
    pieces: list[Quantised],
    numbers: tuple[tuple[int, ...], ...],
    chunk: int,
    scale: float,
    shape: dict[str, int],
) -> None:
    """Write out and lse of every item of ``pieces``; the rest as `_triton_decode.decode` launches its own kernel."""
    q = tensors[0]
    bits = pieces[0].bits
    group = pieces[0].group
    lengths = [piece.length(0, piece.longest) for piece in pieces]
    given = tuple(
        (*piece.tensors(), None if isinstance(length, int) else length)
        for piece, length in zip(pieces, lengths, strict=True)
    )
    strides = tuple(tuple(x.stride() for x in piece.tensors()) for piece in pieces)
    sizes = {"KEYS": math.gcd(group, KEYS), "BITS": bits, "TOKENS": group}
    packed_kernel[grid](
        *(*tensors, given, strides, numbers, q.stride(), chunk, scale * LOG2E),
        **shape,
        **sizes,
        num_warps=4,
        num_stages=2,
    )
