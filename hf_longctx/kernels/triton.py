"""Attention on NVIDIA GPUs in Triton: prefill that reads only the blocks a pattern listed, and split-KV decode.

What no list and no ragged store speeds up, dense causal prefill, stays SDPA's (`cpu.py`). Triton is imported at the
first call, never by importing this file.

Shapes: ``B`` batch, ``H`` query heads, ``n`` KV heads, ``T`` query tokens, ``S`` key tokens, ``D`` head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnsupportedModeError
from ..layout.blocks import BlockList
from ..layout.segments import HeadKV, Segment
from . import _nvidia, cpu
from ._quantized import Packed

NAME = "triton"
# Below cpu's: until it has been timed on a device, `auto` takes it for block lists alone, where it beats a definition.
PREFERENCE = 5

HEAD_DIM = 256  # at most; wider tiles do not fit the shared memory
BLOCKS = (16, 32, 64, 128)  # tokens of a block


def supports(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> str | None:
    """None when this kernel computes the case, otherwise why it does not."""
    if head_dim > HEAD_DIM:
        return f"takes head_dim up to {HEAD_DIM}, not {head_dim}"
    # float32 is computed right, but without matrix instructions: minutes to compile, slow to run.
    return _nvidia.refusal(device, needs_grad) or _nvidia.half_only(dtype) or _nvidia.no_triton(device)


def sparse_prefill(q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scale: float) -> Tensor:
    """Attention ``[B, H, T, D]`` that reads what ``blocks`` lists, the queries being the last T of S tokens.

    k, v ``[B, n, S, D]``, any strides.

    Raises:
        UnsupportedModeError: the list has blocks of another size than `BLOCKS`, or was made for other lengths.
    """
    _check(q, k, v)
    if blocks.block not in BLOCKS:
        raise UnsupportedModeError(
            f"kernel triton reads blocks of {', '.join(map(str, BLOCKS))} tokens, not of {blocks.block}. Use kernel: "
            "reference."
        )
    lengths, made_for = (k.shape[2] - q.shape[2], k.shape[2]), (blocks.first, blocks.kv_len)
    rows, lists, query_blocks = blocks.counts.shape
    touched = -(-blocks.kv_len // blocks.block) - blocks.first // blocks.block
    fits = rows == q.shape[0] and lists in (q.shape[1], k.shape[1]) and query_blocks == touched
    if lengths != made_for or not fits:
        raise UnsupportedModeError(
            f"a list of {rows} rows, {lists} heads and {query_blocks} query blocks for the tokens {made_for[0]} to "
            f"{made_for[1]} was given with {q.shape[0]} rows, {q.shape[1]} query heads and the tokens {lengths[0]} to "
            f"{lengths[1]}. Make the list from the same q and k."
        )
    if not q.numel():
        return torch.zeros_like(q)
    from . import _triton_prefill

    return _triton_prefill.sparse_prefill(q, k, v, blocks, scale)


def streaming_prefill(
    q: Tensor, sink_k: Tensor, sink_v: Tensor, k: Tensor, v: Tensor, *, recent: int, first: int, scale: float
) -> Tensor:
    """StreamingLLM attention (arXiv:2309.17453) as `reference.streaming_prefill` defines it, ``[B, H, T, D]``.

    In O(T * (s + recent)) time, and without copies.
    """
    _check(q, k, v)
    _check(q, sink_k, sink_v)
    if not q.numel():
        return torch.zeros_like(q)
    from . import _triton_prefill

    return _triton_prefill.streaming_prefill(q, sink_k, sink_v, k, v, recent=recent, first=first, scale=scale)


def dense_prefill(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention ``[B, H, T, D]``, the queries being the last T of the S >= T tokens of k, v ``[B, n, S, D]``."""
    return cpu.dense_prefill(q, k, v, scale)


def dense_prefill_segments(q: Tensor, segments: list[Segment], scale: float) -> Tensor:
    """Causal attention ``[B, H, T, D]`` whose queries are the last T tokens of the last segment; all see the others."""
    return decode(q, segments, scale) if q.shape[2] == 1 else cpu.dense_prefill_segments(q, segments, scale)


def decode(q: Tensor, segments: list[Segment], scale: float) -> Tensor:
    """Attention ``[B, H, 1, D]`` of one token over every key of every segment, but for slots past a row's length."""
    return _decode(q, [(tuple(range(segments[0].k.shape[1])), segments)], scale)


def decode_packed(q: Tensor, segments: list[Segment | Packed], scale: float) -> Tensor | None:
    """`decode` over segments some of which are packed, unpacked in the kernel; None where it does not compute that."""
    pieces = [segment for segment in segments if isinstance(segment, Packed)]
    for piece in pieces:
        dims = (piece.k_scale.shape[4], piece.v.shape[3] * 8 // piece.bits)
        if piece.dtype != q.dtype or dims != (q.shape[3], q.shape[3]) or piece.k.device != q.device:
            return None
    return _decode(q, [(tuple(range(segments[0].k.shape[1])), segments)], scale)


def decode_layer(q: Tensor, parts: list[HeadKV], scale: float) -> Tensor:
    """`decode` for all heads of a layer at once: q and the result ``[B, H, 1, D]`` are in the order of its heads.

    Raises:
        UnsupportedModeError: the parts do not hold each KV head of the layer once, or not in the dtype of q.
    """
    held = sorted(head for part in parts for head in part.heads.kv_heads)
    if held != list(range(parts[0].heads.total)):
        raise UnsupportedModeError(
            f"decode_layer was given the KV heads {held} of a layer that has {parts[0].heads.total}: pass every role "
            "of the layer, or call decode role by role."
        )
    return _decode(q, [(part.heads.kv_heads, part.segments) for part in parts], scale)


def _decode(q: Tensor, parts: list[tuple[tuple[int, ...], list[Segment]]], scale: float) -> Tensor:
    """Check and launch; ``parts`` as `_triton_decode.decode` takes them."""
    total = sum(len(kv_heads) for kv_heads, _ in parts)
    for kv_heads, segments in parts:
        for one in segments:
            if isinstance(one, Segment):
                _check(q, one.k, one.v, total, len(kv_heads))
    if q.shape[2] != 1:
        raise UnsupportedModeError(f"decode takes one query token, not {q.shape[2]}. Use dense_prefill_segments.")
    if not q.numel():
        return torch.zeros_like(q)
    from . import _triton_decode

    return _triton_decode.decode(q, parts, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, total: int | None = None, own: int | None = None) -> None:
    """Refuse what the kernels would misread: they get addresses, not shapes.

    ``total`` KV heads share the query heads, ``own`` of which k and v have (None: all).
    """
    total = k.shape[1] if total is None else total
    fits = k.shape == v.shape and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3]) and k.device == v.device
    heads = k.shape[1] == (total if own is None else own) and (q.shape[1] % total == 0 if total else not q.shape[1])
    if not (fits and heads and q.dtype == k.dtype == v.dtype and q.device == k.device):
        shown = (f"{tuple(t.shape)} {t.dtype} {t.device}" for t in (q, k, v))
        raise UnsupportedModeError(
            f"kernel triton takes q [B, H, T, D] with k and v [B, n, S, D] of one dtype, device and head_dim, not "
            f"{', '.join(shown)}. Convert them, or use kernel: cpu."
        )
