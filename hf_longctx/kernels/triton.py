"""Attention on NVIDIA GPUs in Triton: prefill that reads only the blocks a pattern listed, and split-KV decode.

What no list and no ragged store speeds up, dense causal prefill, stays SDPA's (`cpu.py`). Triton is imported at the
first call, never by importing this file.

Shapes: ``B`` batch, ``H`` query heads, ``n`` KV heads, ``T`` query tokens, ``S`` key tokens, ``D`` head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UnsupportedModeError
from ..layout.blocks import BlockList
from ..layout.reads import All, Causal, Reads, Window
from ..layout.scores import Scores
from ..layout.segments import Segment, joined
from . import _nvidia, cpu
from ._arguments import check
from ._quantized import Quantised, packed_reason

if TYPE_CHECKING:
    from .base import Case

Part = tuple[tuple[int, ...], Sequence[Segment | Quantised]]  # KV heads of the layer, what they cached

NAME = "triton"
# Below cpu's: until it has been timed on a device, `auto` takes it for block lists alone, where it beats a definition.
PREFERENCE = 5
READS = frozenset({All, Window, BlockList})

HEAD_DIM = 256  # at most; wider tiles do not fit the shared memory
BLOCKS = (16, 32, 64, 128)  # tokens of a block


def supports(case: Case) -> str | None:
    """None when this kernel computes the case, otherwise why it does not."""
    if case.head_dim > HEAD_DIM:
        return f"takes head_dim up to {HEAD_DIM}, not {case.head_dim}"
    if case.softcap or case.first_bias:
        return "computes neither a softcap nor a bias of the first token"
    if case.kinds and (reason := packed_reason(case)) is not None:
        return reason
    # float32 is computed right, but without matrix instructions: minutes to compile, slow to run.
    missing = _nvidia.refusal(case.device, case.needs_grad) or _nvidia.half_only(case.dtype)
    return missing or _nvidia.no_triton(case.device)


def attend(
    q: Tensor, segments: Sequence[Segment | Quantised], reads: Reads, scores: Scores, want_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Attention as `base` says: out ``[B, H, T, D]``, lse ``[B, H, T]`` where it is wanted.

    Raises:
        UnsupportedModeError: k and v that the kernels would misread; a list with blocks of another size than `BLOCKS`,
            or made for other lengths.
    """
    check(NAME, q, segments, reads, scores)
    if isinstance(reads, All | Causal) and q.shape[2] == 1:
        return _decode(q, [(tuple(range(segments[0].k.shape[1])), segments)], scores.scale)
    if isinstance(reads, BlockList):
        return _sparse(q, *joined(segments), reads, scores.scale)
    if isinstance(reads, Window):
        return _streaming(q, segments, reads, scores.scale)
    return cpu.attend(q, segments, reads, scores, want_lse)


def attend_layer(q: Tensor, parts: Sequence[Part], scores: Scores) -> tuple[Tensor, Tensor]:
    """One decoded token of all heads of a layer in one launch, in the order of its heads: out ``[B, H, 1, D]``, lse.

    Raises:
        UnsupportedModeError: the parts do not hold each KV head of the layer once, or not in the dtype of q.
    """
    held = sorted(head for kv_heads, _ in parts for head in kv_heads)
    if held != list(range(len(held))) or not held or q.shape[1] % len(held):
        raise UnsupportedModeError(
            f"attend_layer was given the KV heads {held} for {q.shape[1]} query heads: pass every role of the layer, "
            "or call attend role by role."
        )
    for _, segments in parts:
        check(NAME, q, segments, All(), scores)
    return _decode(q, parts, scores.scale)


def _sparse(q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scale: float) -> tuple[Tensor, Tensor]:
    """k, v ``[B, n, S, D]``, any strides."""
    _check(q, k, v)
    if blocks.block not in BLOCKS:
        raise UnsupportedModeError(
            f"kernel triton reads blocks of {', '.join(map(str, BLOCKS))} tokens, not of {blocks.block}. Use kernel: "
            "reference."
        )
    rows, lists, query_blocks = blocks.counts.shape
    touched = blocks.key_blocks - blocks.first // blocks.block
    if rows != q.shape[0] or query_blocks != touched:
        raise UnsupportedModeError(
            f"a list of {rows} rows, {lists} heads and {query_blocks} query blocks for the tokens {blocks.first} to "
            f"{blocks.kv_len} was given with {q.shape[0]} rows and {q.shape[1]} query heads. Make the list from the "
            "same q and k."
        )
    if not q.numel():
        return _nothing(q)
    from . import _triton_prefill

    return _triton_prefill.sparse_prefill(q, k, v, blocks, scale)


def _streaming(q: Tensor, segments: Sequence[Segment], reads: Window, scale: float) -> tuple[Tensor, Tensor]:
    """In O(T * (s + recent)) time, and without copies."""
    sinks, band = (segment.contents() for segment in segments)
    _check(q, *band)
    _check(q, *sinks)
    if not q.numel():
        return _nothing(q)
    from . import _triton_prefill

    return _triton_prefill.streaming_prefill(q, *sinks, *band, recent=reads.recent, first=reads.first, scale=scale)


def _nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(q), q.new_full(
        q.shape[:3], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32)
    )


def _decode(q: Tensor, parts: Sequence[Part], scale: float) -> tuple[Tensor, Tensor]:
    """Check and launch; ``parts`` as `_triton_decode.decode` takes them."""
    total = sum(len(kv_heads) for kv_heads, _ in parts)
    for kv_heads, segments in parts:
        for one in segments:
            if isinstance(one, Segment):
                _check(q, one.k, one.v, total, len(kv_heads))
            elif one.dtype != q.dtype or one.k.device != q.device or one.k_scale.shape[4] != q.shape[3]:
                raise UnsupportedModeError(
                    f"kernel triton takes packed keys of the dtype, device and head_dim of the queries, {q.dtype} "
                    f"{q.device} {q.shape[3]}, not {one.dtype} {one.k.device} {one.k_scale.shape[4]}. Use kernel: cpu."
                )
    if q.shape[2] != 1:
        raise UnsupportedModeError(f"decode takes one query token, not {q.shape[2]}. Use attend.")
    if not q.numel():
        return _nothing(q)
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
