"""Triton kernels of prefill: by block list, and over sinks and a window. Online softmax, one program per query block.

Shapes: ``B`` batch, ``H`` query heads, ``n`` KV heads, ``G = H // n``, ``T`` query tokens, ``S`` key tokens, ``D``
head_dim. The heads are the first axis of the grid, so that programs that read the same keys run side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout.blocks import BlockList
from ._triton_tiles import LN2, LOG2E, load_tile, rank, scores_of, settings, softmax_step

ROWS = KEYS = 64  # tile of a window


@triton.jit
def _store(out, lse, strides, row, head, token, q_len, valid, top, total, acc, DIM: tl.constexpr, COLS: tl.constexpr):
    """Write normalised rows and their lse ``[B, H, T]``, base 2; rows that saw nothing are 0 and -inf."""
    sees = total > 0
    acc = acc / tl.where(sees, total, 1.0)[:, None]
    cols = tl.arange(0, COLS)
    places = out + row * strides[0] + head * strides[1] + token[:, None] * strides[2] + cols[None, :] * strides[3]
    tl.store(places, acc.to(out.dtype.element_ty), mask=valid[:, None] & (cols[None, :] < DIM))
    found = tl.where(sees, top + tl.log2(tl.where(sees, total, 1.0)), float("-inf"))
    tl.store(lse + (row * tl.num_programs(0) + head) * q_len + token, found, mask=valid)


@triton.jit(do_not_specialize=["lists", "query_blocks", "width", "columns_width", "steps", "first", "kv_len"])
def sparse_kernel(
    q,
    k,
    v,
    out,
    lse,
    indices,
    counts,
    columns,
    column_counts,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    lists,
    query_blocks,
    width,
    columns_width,
    steps,
    first,
    kv_len,
    scale,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One query block of one head: its columns, its listed blocks, its own block last. Grid (H, NQ, B)."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    nth = query_blocks - 1 - tl.program_id(1)  # those with the most keys start first
    own = first // BLOCK + nth
    listed = row * lists + head * lists // tl.num_programs(0)
    indices += (listed * query_blocks + nth) * width
    columns += listed * columns_width
    k += row * k_strides[0] + head // GROUP * k_strides[1]
    v += row * v_strides[0] + head // GROUP * v_strides[1]

    slots = tl.arange(0, BLOCK)
    position = own * BLOCK + slots
    real = (position >= first) & (position < kv_len)
    token = (position - first).to(tl.int64)
    queries = load_tile(
        q + row * q_strides[0] + head * q_strides[1], token, q_strides[2], q_strides[3], real, DIM, COLS
    )
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, COLS], tl.float32)

    count = tl.load(counts + listed * query_blocks + nth)
    past = rank(indices, count, own, steps)
    for nth_block in range(0, past):
        start = tl.load(indices + nth_block).to(tl.int64) * BLOCK
        keys = load_tile(k + start * k_strides[2], slots, k_strides[2], k_strides[3], None, DIM, COLS)
        values = load_tile(v + start * v_strides[2], slots, v_strides[2], v_strides[3], None, DIM, COLS)
        top, total, acc = softmax_step(top, total, acc, scores_of(queries, keys, scale), values)

    before = rank(columns, tl.load(column_counts + listed), own * BLOCK, steps)
    for low in range(0, before, BLOCK):
        valid = low + slots < before
        column = tl.load(columns + low + slots, mask=valid, other=0)
        place = rank(indices, past, column // BLOCK, steps)
        known = valid & (place < past)
        twice = known & (tl.load(indices + place, mask=known, other=0) == column // BLOCK)
        valid = valid & (twice == 0)
        keys = load_tile(k, column.to(tl.int64), k_strides[2], k_strides[3], valid, DIM, COLS)
        values = load_tile(v, column.to(tl.int64), v_strides[2], v_strides[3], valid, DIM, COLS)
        scores = tl.where(valid[None, :], scores_of(queries, keys, scale), float("-inf"))
        top, total, acc = softmax_step(top, total, acc, scores, values)

    if rank(indices, count, own + 1, steps) > past:
        start = own.to(tl.int64) * BLOCK
        valid = position < kv_len
        keys = load_tile(k + start * k_strides[2], slots, k_strides[2], k_strides[3], valid, DIM, COLS)
        values = load_tile(v + start * v_strides[2], slots, v_strides[2], v_strides[3], valid, DIM, COLS)
        scores = tl.where(slots[None, :] <= slots[:, None], scores_of(queries, keys, scale), float("-inf"))
        top, total, acc = softmax_step(top, total, acc, scores, values)
    _store(out, lse, out_strides, row, head, token, kv_len - first, real, top, total, acc, DIM, COLS)


@triton.jit(do_not_specialize=["q_len", "sinks", "band", "recent", "first"])
def streaming_kernel(
    q,
    sink_k,
    sink_v,
    k,
    v,
    out,
    lse,
    q_strides,
    sink_k_strides,
    sink_v_strides,
    k_strides,
    v_strides,
    out_strides,
    q_len,
    sinks,
    band,
    recent,
    first,
    scale,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """``ROWS`` queries of one head over the sinks and their windows. Grid (H, ceil(T / ROWS), B)."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(1) * ROWS
    token = begin + tl.arange(0, ROWS)
    real = token < q_len
    past = first + band - q_len  # row position of the first query
    position = past + token
    sink_k += row * sink_k_strides[0] + head // GROUP * sink_k_strides[1]
    sink_v += row * sink_v_strides[0] + head // GROUP * sink_v_strides[1]
    k += row * k_strides[0] + head // GROUP * k_strides[1]
    v += row * v_strides[0] + head // GROUP * v_strides[1]

    q += row * q_strides[0] + head * q_strides[1]
    queries = load_tile(q, token.to(tl.int64), q_strides[2], q_strides[3], real, DIM, COLS)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    slots = tl.arange(0, KEYS)
    for low in range(0, sinks, KEYS):
        slot = low + slots
        keys = load_tile(sink_k, slot, sink_k_strides[2], sink_k_strides[3], slot < sinks, DIM, COLS)
        values = load_tile(sink_v, slot, sink_v_strides[2], sink_v_strides[3], slot < sinks, DIM, COLS)
        visible = (slot < sinks)[None, :] & (slot[None, :] <= position[:, None])
        scores = tl.where(visible, scores_of(queries, keys, scale), float("-inf"))
        top, total, acc = softmax_step(top, total, acc, scores, values)
    end = tl.minimum(past + tl.minimum(begin + ROWS, q_len) - first, band)
    for low in range(tl.maximum(past + begin - recent + 1 - first, 0), end, KEYS):
        slot = low + slots
        valid = slot < end
        far = tl.cast(low, tl.int64)
        keys = load_tile(k + far * k_strides[2], slots, k_strides[2], k_strides[3], valid, DIM, COLS)
        values = load_tile(v + far * v_strides[2], slots, v_strides[2], v_strides[3], valid, DIM, COLS)
        age = position[:, None] - (first + slot)[None, :]
        visible = valid[None, :] & (age >= 0) & (age < recent)
        scores = tl.where(visible, scores_of(queries, keys, scale), float("-inf"))
        top, total, acc = softmax_step(top, total, acc, scores, values)
    _store(out, lse, out_strides, row, head, token.to(tl.int64), q_len, real, top, total, acc, DIM, COLS)


def sparse_prefill(q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scale: float) -> tuple[Tensor, Tensor]:
    """(out ``[B, H, T, D]``, lse) of what ``blocks`` lists; k, v ``[B, n, S, D]``. Reads nothing back."""
    batch, heads, q_len, dim = q.shape
    out, lse = _results(q)
    lists = [t.to(torch.int32).contiguous() for t in (blocks.indices, blocks.counts)]
    lists += [t.to(torch.int32).contiguous() for t in (blocks.columns, blocks.column_counts)]
    indices, _, columns, _ = lists
    width = indices.shape[3]
    columns_width = columns.shape[2]
    with torch.cuda.device_of(q):
        sparse_kernel[heads, indices.shape[2], batch](
            *(q, k, v, out, lse, *lists),
            *(t.stride() for t in (q, k, v, out)),
            *(indices.shape[1], indices.shape[2], width, columns_width),
            max(width, columns_width).bit_length(),
            *(blocks.first, blocks.kv_len, scale * LOG2E),
            GROUP=heads // k.shape[1],
            DIM=dim,
            COLS=max(16, triton.next_power_of_2(dim)),
            BLOCK=blocks.block,
            **settings(q, blocks.block, blocks.block),
        )
    return out, lse.mul_(LN2)


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    """Room for out, in the layout that models want, and for lse."""
    batch, heads, q_len, dim = q.shape
    out = q.new_empty(batch, q_len, heads, dim).transpose(1, 2)
    return out, torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)


def streaming_prefill(
    q: Tensor, sink_k: Tensor, sink_v: Tensor, k: Tensor, v: Tensor, *, recent: int, first: int, scale: float
) -> tuple[Tensor, Tensor]:
    """StreamingLLM attention (arXiv:2309.17453), out ``[B, H, T, D]`` and lse, over a `Window`."""
    batch, heads, q_len, dim = q.shape
    out, lse = _results(q)
    tensors = (q, sink_k, sink_v, k, v, out)
    with torch.cuda.device_of(q):
        streaming_kernel[heads, triton.cdiv(q_len, ROWS), batch](
            *tensors,
            lse,
            *(t.stride() for t in tensors),
            *(q_len, sink_k.shape[2], k.shape[2], recent, first, scale * LOG2E),
            GROUP=heads // k.shape[1],
            DIM=dim,
            COLS=max(16, triton.next_power_of_2(dim)),
            ROWS=ROWS,
            KEYS=KEYS,
            **settings(q, ROWS, KEYS),
        )
    return out, lse.mul_(LN2)
