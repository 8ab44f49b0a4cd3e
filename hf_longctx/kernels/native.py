"""Attention on the CPU in C++, compiled at the first use: decode, sparse, streaming and dense prefill. No gradients.

Keys and values are read where they lie, in float32 or bfloat16; the softmax and its sums are float32. Threads, as many
as `torch.set_num_threads` says, live for one call, so a process may fork at any time. What a function here does not
compute (a gradient that only keys need, a score bias over several queries) it hands to the cpu kernel, and ``auto``
takes that kernel where there is no compiler. ``HF_LONGCTX_NATIVE=0`` turns this one off. Tensors, lengths and
lists that do not fit each other are a ValueError: the library would read outside of them.

Shapes as in `cpu.py`: ``B`` batch, ``H`` query heads, ``n`` KV heads of one role, ``G = H // n``, ``T`` query tokens,
``S`` key tokens, ``D`` head_dim.
"""

from __future__ import annotations

import ctypes
import logging
import os
from array import array
from collections.abc import Iterable
from ctypes import c_double, c_int, c_void_p
from functools import cache
from typing import NoReturn

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedModeError
from ..layout.blocks import BlockList
from ..layout.dtypes import needs_grad
from ..layout.segments import Segment
from . import _native_build, cpu, reference
from ._quantized import Packed

log = logging.getLogger(__name__)

NAME = "native"
PREFERENCE = 20

SWITCH = "HF_LONGCTX_NATIVE"
HEAD_DIM = 256  # at most, and a multiple of 16
WIDTH = 8  # float32 numbers of a vector, at least: with 4 (measured without AVX) torch is up to twice as fast


def supports(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> str | None:
    """None when this kernel computes the case, otherwise why it does not. Compiles it, the first time it would.

    Raises:
        ConfigError: ``HF_LONGCTX_NATIVE`` is neither 0 nor 1.
    """
    if device.type != "cpu":
        return f"needs tensors on the CPU, not on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 and bfloat16, not {dtype}"
    if head_dim % 16 or not 0 < head_dim <= HEAD_DIM:
        return f"takes a head_dim that is a multiple of 16 up to {HEAD_DIM}, not {head_dim}"
    if needs_grad:
        return "computes no gradients"
    if torch.compiler.is_compiling():
        return "cannot be traced by torch.compile"
    return _load()[1]


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or None and why there is none, which is logged once; the environment is read here, once."""
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ConfigError(f"{SWITCH} is 0 (off) or 1 (on, the default), given {switch!r}.")
    if switch == "0":
        return None, f"is turned off by {SWITCH}=0"
    try:
        library = ctypes.CDLL(str(_native_build.library()))
    except (_native_build.BuildError, OSError) as error:
        log.warning("no native CPU kernel, the slower cpu kernel (torch) runs instead: %s", error)
        return None, f"could not be built: {error}"
    if library.hf_longctx_width() < WIDTH:
        return None, "is slower than kernel cpu where there are neither AVX2 nor AVX-512 instructions"
    for name in ("decode", "dense", "streaming", "sparse"):
        getattr(library, f"hf_longctx_{name}").argtypes = (c_int, c_double, c_void_p)
    return library, None


class _Call:
    """One call into the library: its arguments as the int64 numbers of the structures in ``_native/vectors.h``.

    Built from ctypes structures they would take longer than a decoded token over a short window. Holds the tensors.
    """

    def __init__(self) -> None:
        self.held: list[Tensor] = []

    def pointer(self, x: Tensor) -> int:
        self.held.append(x)
        return x.data_ptr()

    def heads(self, x: Tensor) -> tuple[int, ...]:
        """``Heads``: where ``x [B, heads, tokens, D]`` is, and its strides in bytes."""
        x, size = x if x.stride(-1) == 1 else x.contiguous(), x.element_size()
        batch, head, token, _ = x.stride()
        return self.pointer(x), size * batch, size * head, size * token

    def segment(self, segment: Segment) -> tuple[int, ...]:
        """``Segment``; where rows differ, the length is the capacity, which bounds what is read."""
        lengths, bias, strides, length = 0, 0, (0, 0, 0), segment.longest
        if not 0 <= length <= min(segment.k.shape[2], segment.v.shape[2]):
            _refuse(f"{segment.k.shape[2]} keys and {segment.v.shape[2]} values for a length of {length}")
        if isinstance(segment.length, Tensor):
            lengths = self.lengths(segment.length, segment.k)
        if segment.bias is not None:
            added = segment.bias.float()[(None,) * (4 - segment.bias.dim())]
            added = added.expand(segment.k.shape[0], segment.k.shape[1], 1, segment.longest)
            bias, strides = self.pointer(added), (added.stride(0), added.stride(1), added.stride(3))
        return *self.heads(segment.k), *self.heads(segment.v), length, lengths, bias, *strides

    def lengths(self, lengths: Tensor, k: Tensor) -> int:
        if lengths.shape != k.shape[:1] or lengths.device != k.device:
            _refuse(f"lengths {list(lengths.shape)} on {lengths.device} for keys {list(k.shape)} on {k.device}")
        return self.pointer(lengths.to(torch.int64).contiguous())

    def piece(self, piece: Packed, q: Tensor) -> tuple[int, ...]:
        """``Packed``"""
        _check_piece(piece, q)
        tensors = (piece.k, piece.k_scale.flatten(3), piece.v, piece.v_scale)
        length, lengths = piece.length(0, piece.longest), 0
        if isinstance(length, Tensor):
            length, lengths = piece.longest, self.lengths(length, piece.k)
        return *(number for x in tensors for number in self.heads(x)), length, lengths, piece.bits, piece.group

    def segments(self, segments: list[Segment]) -> list[int]:
        """How many, and each of them."""
        return [len(segments), *(number for segment in segments for number in self.segment(segment))]

    def run(self, name: str, q: Tensor, kv_heads: int, scale: float, arguments: Iterable[int]) -> Tensor:
        """Attention ``[B, H, T, D]``, a view of ``[B, T, H, D]``, the layout that models want."""
        batch, heads, q_len, dim = q.shape
        out = q.new_empty(batch, q_len, heads, dim).transpose(1, 2)
        shape = (batch, heads, kv_heads, q_len, dim, torch.get_num_threads())
        packed = array("q", (*shape, *self.heads(q), *self.heads(out), *arguments))
        function = getattr(_load()[0], f"hf_longctx_{name}")
        used = function(q.dtype == torch.bfloat16, scale, packed.buffer_info()[0])
        if used < 0:
            _refuse(f"{heads} query heads for {kv_heads} KV heads")
        if not used:
            raise MemoryError(f"kernel native: no memory for the temporaries of {name}")
        return out


def _refuse(what: str) -> NoReturn:
    """The library reads where it is told to: what does not fit would end the process, or give another answer."""
    raise ValueError(f"kernel native was given {what}: they do not belong together. Use what the cache returned.")


def _check_piece(piece: Packed, q: Tensor) -> None:
    slots, dim, heads = piece.slots, q.shape[3], piece.k.shape[1]
    if piece.bits not in (4, 8) or piece.group < 1 or slots % piece.group or not 0 <= piece.longest <= slots:
        _refuse(f"{slots} slots of {piece.bits} bits in groups of {piece.group} for a length of {piece.longest}")
    expected = Packed.shapes((q.shape[0], heads), dim, dim, slots, piece.bits, piece.group, q.dtype)
    for (name, (dtype, shape)), x in zip(expected.items(), piece.tensors(), strict=True):
        if x.shape != shape or x.dtype != dtype or x.device != q.device:
            _refuse(f"{name} {x.dtype} {list(x.shape)} on {x.device} for {dtype} {list(shape)} on {q.device}")


def _check_lists(blocks: BlockList, q: Tensor) -> None:
    """That every block and column of a list lies within the keys, and every count within its list."""
    (batch, lists, queries, width), shape = blocks.indices.shape, blocks.counts.shape
    columns = (batch, lists, blocks.columns.shape[-1])
    if (blocks.block < 1 or batch != q.shape[0] or q.shape[1] % lists or shape != (batch, lists, queries)) or (
        queries != blocks.key_blocks - blocks.first // blocks.block
        or blocks.columns.shape != columns
        or blocks.column_counts.shape != columns[:2]
    ):
        _refuse(f"lists {list(blocks.indices.shape)} of blocks of {blocks.block} for queries {list(q.shape)}")
    bounds = ((blocks.indices, blocks.key_blocks), (blocks.counts, width + 1))
    bounds += ((blocks.columns, blocks.kv_len), (blocks.column_counts, columns[2] + 1))
    for numbers, end in bounds:
        low, high = torch.aminmax(numbers) if numbers.numel() else (0, 0)
        if low < 0 or high >= end:
            _refuse(f"lists with {int(low)} to {int(high)} where {end} ends")


def _computes(scale: float, q: Tensor, *kv: Tensor) -> bool:
    """Whether the library takes the call; whoever was refused by `supports` may still ask for the answer."""
    if supports(q.device, q.dtype, q.shape[3], needs_grad(q, *kv)) is not None:
        return False
    batch, kv_heads, dim = q.shape[0], kv[0].shape[1] if kv else 0, q.shape[3]
    if kv and (not kv_heads or q.shape[1] % kv_heads):
        _refuse(f"{q.shape[1]} query heads for {kv_heads} KV heads")
    for x in kv:
        if x.dtype != q.dtype or x.device != q.device or (x.shape[0], x.shape[1], x.shape[3]) != (batch, kv_heads, dim):
            return False
    return q.numel() > 0 and 1e-30 < scale < 1e30


def _of(segments: list[Segment]) -> list[Tensor]:
    return [x for segment in segments for x in (segment.k, segment.v)]


def decode(q: Tensor, segments: list[Segment], scale: float) -> Tensor:
    """Attention ``[B, H, 1, D]`` of one token over every key of every segment, but for slots past a row's length."""
    biased = [segment.bias for segment in segments]
    if not _computes(scale, q, *_of(segments)) or needs_grad(*biased):
        return cpu.decode(q, segments, scale)
    call = _Call()
    return call.run("decode", q, segments[0].k.shape[1], scale, [*call.segments(segments), 0])


def decode_packed(q: Tensor, segments: list[Segment | Packed], scale: float) -> Tensor | None:
    """`decode` over segments some of which are packed, unpacked tile by tile; None where it does not compute that."""
    plain = [segment for segment in segments if isinstance(segment, Segment)]
    pieces = [segment for segment in segments if isinstance(segment, Packed)]
    if not _computes(scale, q, *_of(plain)) or needs_grad(*(segment.bias for segment in plain)):
        return None
    for piece in pieces:
        dims = (piece.k_scale.shape[4], piece.v.shape[3] * 8 // piece.bits)
        if piece.dtype != q.dtype or dims != (q.shape[3], q.shape[3]) or q.shape[3] % _load()[0].hf_longctx_width():
            return None
        if piece.bits == 4 and q.shape[3] % (2 * _load()[0].hf_longctx_width()):
            return None
    call = _Call()
    kv_heads = {segment.k.shape[1] for segment in segments}
    if len(kv_heads) != 1:
        _refuse(f"segments of {sorted(kv_heads)} KV heads")
    numbers = [*call.segments(plain), len(pieces), *(number for piece in pieces for number in call.piece(piece, q))]
    return call.run("decode", q, *kv_heads, scale, numbers)


def dense_prefill_segments(q: Tensor, segments: list[Segment], scale: float) -> Tensor:
    """Causal attention ``[B, H, T, D]`` whose queries are the last T tokens of the last segment; all see the others.

    Where a length differs by row, the queries of that row are the last T tokens of its own length.
    """
    if q.shape[2] == 1:
        return decode(q, segments, scale)
    if not _computes(scale, q, *_of(segments)) or any(segment.bias is not None for segment in segments):
        return cpu.dense_prefill_segments(q, segments, scale)
    call = _Call()
    return call.run("dense", q, segments[0].k.shape[1], scale, call.segments(segments))


def dense_prefill(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention ``[B, H, T, D]``, the queries being the last T of the S >= T tokens of k, v ``[B, n, S, D]``."""
    return dense_prefill_segments(q, [Segment(k, v, k.shape[2])], scale)


def streaming_prefill(
    q: Tensor, sink_k: Tensor, sink_v: Tensor, k: Tensor, v: Tensor, *, recent: int, first: int, scale: float
) -> Tensor:
    """StreamingLLM attention (arXiv:2309.17453), as `cpu.streaming_prefill` but without temporaries.

    sink_k, sink_v ``[B, n, s, D]`` are the row positions 0..s-1, k, v ``[B, n, N, D]`` the positions first..first+N-1,
    first >= s; the queries, ``[B, H, T, D]``, are the last T row positions up to first+N-1. Query i reads the sinks r
    <= i and, of the band, the positions j <= i with i - j < recent (recent >= 1).
    """
    if not _computes(scale, q, sink_k, sink_v, k, v):
        return cpu.streaming_prefill(q, sink_k, sink_v, k, v, recent=recent, first=first, scale=scale)
    seen = first + k.shape[2]
    if recent < 1 or not sink_k.shape[2] <= first or q.shape[2] > seen:
        _refuse(
            f"a window of {recent}, {sink_k.shape[2]} sinks and a band from {first} to {seen} for {q.shape[2]} queries"
        )
    call = _Call()
    sinks, band = (call.segment(Segment(*pair, pair[0].shape[2])) for pair in ((sink_k, sink_v), (k, v)))
    return call.run("streaming", q, k.shape[1], scale, (first, recent, *sinks, *band))


def sparse_prefill(q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scale: float) -> Tensor:
    """Attention ``[B, H, T, D]`` that reads what ``blocks`` lists, the queries being the last T of S tokens.

    Raises:
        UnsupportedModeError: the list is of other sizes than q and k.
    """
    queries, lists = blocks.kv_len - blocks.first, blocks.counts.shape[1]
    if q.shape[2] != queries or k.shape[2] < blocks.kv_len or lists not in (q.shape[1], k.shape[1]):
        raise UnsupportedModeError(
            f"sparse prefill was given {q.shape[1]} heads of {q.shape[2]} queries, {k.shape[1]} of {k.shape[2]} keys, "
            f"with {lists} lists for {queries} queries and {blocks.kv_len} keys. Make the BlockList for this q and k."
        )
    if not _computes(scale, q, k, v):
        return (reference if needs_grad(q, k, v) else cpu).sparse_prefill(q, k, v, blocks, scale)
    if v.shape[2] < blocks.kv_len:
        _refuse(f"{v.shape[2]} values for {blocks.kv_len} keys")
    _check_lists(blocks, q)
    call = _Call()
    tensors = (blocks.indices, blocks.counts, blocks.columns, blocks.column_counts)
    sizes = (lists, blocks.indices.shape[2], blocks.indices.shape[3], blocks.columns.shape[2])
    pointers = (call.pointer(x.to(torch.int32).contiguous()) for x in tensors)
    made = (blocks.block, blocks.first, blocks.kv_len, *sizes, *pointers)
    return call.run("sparse", q, k.shape[1], scale, (*call.heads(k), *call.heads(v), *made))
