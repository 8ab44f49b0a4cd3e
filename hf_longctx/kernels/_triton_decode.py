"""Triton kernels of decode: one query token over every kept key of every segment of every role, then the parts merged.

A work item is ``chunk`` keys of one segment of one KV head; all items of a layer run in one launch, whatever their
role, and the query heads of a group are the rows of one tile. A second small launch merges what the items found.

Shapes: ``B`` batch, ``H`` query heads, ``n`` KV heads, ``G = H // n`` query heads per KV head, ``D`` head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout.segments import Segment
from . import _triton_quantized
from ._quantized import Quantised
from ._triton_tiles import LN2, LOG2E, load_tile, scores_of, settings, softmax_step, store_part, units

KEYS = 64  # keys of a tile
LEAST = 256  # keys that an item should have before another multiprocessor is given work
WAVES = 4  # items per multiprocessor
PARTS = 16  # parts that the merge reads at a time


def _plain(number: int) -> int:
    """A number that no launch is specialised on, for tuples, to which `do_not_specialize` does not reach.

    Triton compiles a kernel anew for 1 and for multiples of 16, so a length would do that step after step. This is
    neither; the kernels divide by 16.
    """
    return 16 * number + 8


@triton.jit
def _item(
    queries,
    segment,
    strides,
    row,
    local,
    low,
    longest,
    chunk,
    scale,
    part_out,
    part_lse,
    LOG2E: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    COLS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The keys ``low .. low + chunk`` of one KV head of one segment: normalised out ``[G, D]`` and lse ``[G]``."""
    k, v, lengths, bias = segment
    k_strides, v_strides, bias_strides = strides
    end = longest
    if lengths is not None:
        end = tl.minimum(tl.load(lengths + row).to(tl.int32), longest)
    end = tl.minimum(end, low + chunk)
    k += row * k_strides[0] + local * k_strides[1]
    v += row * v_strides[0] + local * v_strides[1]
    slots = tl.arange(0, KEYS)
    top = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_ROWS], tl.float32)
    acc = tl.zeros([GROUP_ROWS, COLS], tl.float32)
    for start in range(low, end, KEYS):
        far = tl.cast(start, tl.int64)
        valid = start + slots < end
        keys = load_tile(k + far * k_strides[2], slots, k_strides[2], k_strides[3], valid, DIM, COLS)
        values = load_tile(v + far * v_strides[2], slots, v_strides[2], v_strides[3], valid, DIM, COLS)
        scores = scores_of(queries, keys, scale)
        if bias is not None:
            places = bias + row * bias_strides[0] + local * bias_strides[1] + (start + slots) * bias_strides[2]
            scores += tl.load(places, mask=valid, other=0.0).to(tl.float32)[None, :] * LOG2E
        scores = tl.where(valid[None, :], scores, float("-inf"))
        top, total, acc = softmax_step(top, total, acc, scores, values)
    store_part(part_out, part_lse, top, total, acc, GROUP, GROUP_ROWS, DIM, COLS)


@triton.jit(do_not_specialize=["chunk"])
def decode_kernel(
    q,
    order,
    outs,
    lses,
    segments,
    strides,
    numbers,
    q_strides,
    chunk,
    scale,
    LOG2E: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    COLS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One work item. Grid (items, B). ``numbers``: see `_plan`; `_plain` numbers."""
    item = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    for s in tl.static_range(len(segments)):
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
                segments[s],
                strides[s],
                row,
                local.to(tl.int64),
                split * chunk,
                numbers[s][4] // 16,
                chunk,
                scale,
                outs + slot * GROUP * DIM,
                lses + slot * GROUP,
                LOG2E,
                GROUP,
                GROUP_ROWS,
                DIM,
                COLS,
                KEYS,
            )


@triton.jit
def merge_kernel(
    outs,
    lses,
    order,
    out,
    out_lse,
    roles,
    out_strides,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    COLS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The parts of one query head to its output. Grid (H, B). ``roles``: see `_plan`; `_plain` numbers."""
    nth = tl.program_id(0) // GROUP
    row = tl.program_id(1).to(tl.int64)
    member = tl.program_id(0) % GROUP
    cols = tl.arange(0, COLS)
    parts = tl.arange(0, PARTS)
    head = tl.load(order + nth) * GROUP + member
    for r in tl.static_range(len(roles)):
        offset = roles[r][0] // 16
        heads = roles[r][1] // 16
        base = roles[r][2] // 16
        width = roles[r][3] // 16
        if (nth >= offset) & (nth < offset + heads):
            slot = base + (row * heads + nth - offset) * width
            top = tl.full([1], float("-inf"), tl.float32)
            total = tl.zeros([1], tl.float32)
            acc = tl.zeros([COLS], tl.float32)
            for low in range(0, width, PARTS):
                valid = low + parts < width
                where = (slot + low + parts) * GROUP + member
                lse = tl.load(lses + where, mask=valid, other=float("-inf"))
                new = tl.maximum(top, tl.max(lse, 0))
                finite = tl.where(new == float("-inf"), 0.0, new)
                weights = tl.exp2(lse - finite)
                keep = tl.exp2(top - finite)
                mask = valid[:, None] & (cols < DIM)[None, :]
                part = tl.load(outs + where[:, None] * DIM + cols[None, :], mask=mask, other=0.0)
                total = total * keep + tl.sum(weights, 0)
                acc = acc * keep + tl.sum(weights[:, None] * part, 0)
                top = new
            acc = acc / tl.where(total == 0, 1.0, total)
            places = out + row * out_strides[0] + head * out_strides[1] + cols * out_strides[3]
            tl.store(places, acc.to(out.dtype.element_ty), mask=cols < DIM)
            sees = total > 0
            found = tl.where(sees, top + tl.log2(tl.where(sees, total, 1.0)), float("-inf"))
            one = tl.arange(0, 1)
            tl.store(out_lse + row * tl.num_programs(0) + head + one, found)


@lru_cache(maxsize=1024)
def _order(kv_heads: tuple[int, ...], device: torch.device) -> Tensor:
    """The heads as int32 on the device, put there once: a copy in every layer of every step would cost more."""
    with torch.inference_mode(False):
        return torch.tensor(kv_heads, dtype=torch.int32, device=device)


def decode(
    q: Tensor, parts: Sequence[tuple[tuple[int, ...], Sequence[Segment | Quantised]]], scale: float
) -> tuple[Tensor, Tensor]:
    """(out ``[B, H, 1, D]``, lse ``[B, H, 1]``) of one token q ``[B, H, 1, D]`` over all segments of all parts.

    Args:
        q: the queries, in the order of the layer's heads.
        parts: (kv_heads, segments) of every role: the KV heads of the layer that it has, ascending, each in one part.
        scale: factor of the scores.
    """
    batch, heads, _, dim = q.shape
    order = _order(tuple(head for kv_heads, _ in parts for head in kv_heads), q.device)
    group = heads // len(order)
    chunk, segments, numbers, roles, items, slots = _plan(batch, parts, units(q.device))
    lse = torch.full((batch, heads, 1), float("-inf"), dtype=torch.float32, device=q.device)
    if not items:
        return torch.zeros_like(q), lse
    outs = torch.empty(slots, group, dim, dtype=torch.float32, device=q.device)
    lses = torch.empty(slots, group, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    shape = {"GROUP": group, "DIM": dim, "COLS": max(16, triton.next_power_of_2(dim))}
    rows = max(16, triton.next_power_of_2(group))
    sorts = {True: ([], []), False: ([], [])}  # plain segments, packed ones, each with its numbers
    for one, number in zip(segments, numbers, strict=True):
        for found, x in zip(sorts[isinstance(one, Segment)], (one, number), strict=True):
            found.append(x)
    (plain, plain_numbers), (packed, packed_numbers) = sorts.values()
    with torch.cuda.device_of(q):
        if plain:
            biases = [_bias(segment) for segment in plain]
            lengths = [None if isinstance(one.length, int) else one.length.contiguous() for one in plain]
            given = zip(plain, lengths, biases, strict=True)
            tensors = tuple((one.k, one.v, length, bias) for one, length, bias in given)
            strides = tuple((k.stride(), v.stride(), _bias_strides(bias)) for k, v, _, bias in tensors)
            decode_kernel[items, batch](
                *(
                    q,
                    order,
                    outs,
                    lses,
                    tensors,
                    strides,
                    tuple(plain_numbers),
                    q.stride(),
                    chunk,
                    scale * LOG2E,
                    LOG2E,
                ),
                **shape,
                GROUP_ROWS=rows,
                KEYS=KEYS,
                **settings(q, rows, KEYS),
            )
        if packed:
            found = (packed, tuple(packed_numbers), chunk, scale, {**shape, "GROUP_ROWS": rows})
            _triton_quantized.launch((items, batch), (q, order, outs, lses), *found)
        merge_kernel[heads, batch](outs, lses, order, out, lse, roles, out.stride(), **shape, PARTS=PARTS)
    return out, lse.mul_(LN2)


def _plan(batch: int, parts: Sequence[tuple[tuple[int, ...], Sequence[Segment | Quantised]]], processors: int) -> tuple:
    """How a layer's keys are cut into items, from Python numbers alone.

    Returns (keys per item, segments, their numbers, roles, items per row, slots). The numbers of a segment are: its
    first item, items per head, heads, place of the first head in the order, keys at most, first slot of its role, slots
    per head, first slot among those. A role is (place of the first head in the order, heads, first slot, slots per
    head). A slot holds the result of one item.
    """
    kept = [(kv_heads, [one for one in segments if one.longest]) for kv_heads, segments in parts]
    keys = batch * sum(len(kv_heads) * one.longest for kv_heads, segments in kept for one in segments)
    chunk = triton.cdiv(max(LEAST, triton.cdiv(keys, WAVES * processors)), KEYS) * KEYS
    flat = []
    numbers = []
    roles = []
    items = 0
    slots = 0
    offset = 0
    for kv_heads, segments in kept:
        count = len(kv_heads)
        place = 0
        width = sum(triton.cdiv(one.longest, chunk) for one in segments)
        for one in segments:
            splits = triton.cdiv(one.longest, chunk)
            flat.append(one)
            numbers.append((items, splits, count, offset, one.longest, slots, width, place))
            items = items + count * splits
            place = place + splits
        roles.append((offset, count, slots, width))
        slots = slots + batch * count * width
        offset = offset + count
    numbers, roles = (tuple(tuple(map(_plain, one)) for one in told) for told in (numbers, roles))
    return chunk, flat, numbers, roles, items, slots


def _bias(segment: Segment) -> Tensor | None:
    """A view ``[B, n, 1, longest]`` of the bias."""
    if segment.bias is None:
        return None
    return segment.bias.broadcast_to(*segment.k.shape[:2], 1, segment.longest)


def _bias_strides(bias: Tensor | None) -> tuple[int, ...]:
    """Of the rows, heads and keys: that of the queries, of which there is one, is a length, and lengths vary."""
    return () if bias is None else (bias.stride(0), bias.stride(1), bias.stride(3))
