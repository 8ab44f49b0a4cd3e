"""Attention on the CPU in C++, compiled at the first use: decode, sparse, streaming and dense prefill. No gradients.

Keys and values are read where they lie, in float32 or bfloat16; the softmax and its sums are float32. Threads, as many
as `torch.set_num_threads` says, are torch's own; in a forked child, and where those cannot be found, they live for one
call, so a process may fork at any time. What a function here does not
compute (a gradient that only keys need, a score bias over several queries) it hands to the cpu kernel, and ``auto``
takes that kernel where there is no compiler, and where it was measured to be faster (``native_speed.json``).
``HF_LONGCTX_NATIVE=0`` turns this one off. Tensors, lengths and
lists that do not fit each other are a ValueError: the library would read outside of them.

Shapes as in `cpu.py`: ``B`` batch, ``H`` query heads, ``n`` KV heads of one role, ``G = H // n``, ``T`` query tokens,
``S`` key tokens, ``D`` head_dim.
"""

from __future__ import annotations

import ctypes
import logging
import os
from array import array
from collections.abc import Iterable, Sequence
from ctypes import c_char_p, c_double, c_int, c_void_p
from functools import cache, partial
from typing import NoReturn

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedModeError
from ..layout.blocks import BlockList
from ..layout.dtypes import needs_grad
from ..layout.head_pages import HeadPages
from ..layout.heads import RoleHeads
from ..layout.ragged import Ragged
from ..layout.reads import ALL, All, Averaged, Causal, Reads, Window
from ..layout.scores import Scores
from ..layout.segments import Segment
from . import _by_head, _first_token, _native_build, _native_pages, _native_ragged, _native_speed, cpu, reference
from ._arguments import ANY_LENGTHS, check
from ._native_step import LayerStep, heads_of, takes_scale
from ._native_threads import openmp_start
from ._quantized import Quantised, packed_reason
from .base import Case

log = logging.getLogger(__name__)

NAME = "native"
PREFERENCE = 20
READS = frozenset({All, Causal, Window, BlockList})

SWITCH = "HF_LONGCTX_NATIVE"
HEAD_DIM = 256  # at most, and a multiple of 16
WIDTH = 8  # float32 numbers of a vector, at least: with 4 (measured without AVX) torch is up to twice as fast


def supports(case: Case) -> str | None:
    """None when this kernel computes the case, otherwise why it does not. Compiles it, the first time it would.

    Raises:
        ConfigError: ``HF_LONGCTX_NATIVE`` is neither 0 nor 1, or ``HF_LONGCTX_NATIVE_ARCH`` cannot be met.
    """
    reason = _reason(case.device, case.dtype, case.head_dim, case.needs_grad)
    if reason is not None or not case.kinds:
        return reason
    if case.kinds == _native_pages.PAGES:
        return _native_pages.reason(case.reads, case.one_query, case.device)
    if case.kinds == _by_head.RAGGED:
        return _by_head.reason(case.kinds, case.reads, case.device)
    return packed_reason(case, _load()[0].hf_longctx_width())


def preference(case: Case) -> int:
    """`PREFERENCE`, or less than the cpu kernel's where that was measured to be faster on this kind of machine."""
    faster = _native_speed.faster(arch(), case)
    return PREFERENCE if faster is None or faster >= 1 else cpu.PREFERENCE - 1


def arch() -> str:
    """The kind of machine, as `_native_speed.arch_of` says; it needs the library."""
    return _native_speed.arch_of(_library())


def _reason(device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool) -> str | None:
    """Why plain segments are not computed; None where they are."""
    if device.type != "cpu":
        return f"needs tensors on the CPU, not on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 and bfloat16, not {dtype}"
    if head_dim % 16 or not 0 < head_dim <= HEAD_DIM:
        return f"takes a head_dim that is a multiple of 16 up to {HEAD_DIM}, not {head_dim}"
    if gradients:
        return "computes no gradients"
    if torch.compiler.is_compiling():
        return "cannot be traced by torch.compile"
    return _load()[1]


def attend(
    q: Tensor,
    segments: Sequence[Segment | Quantised | Ragged | HeadPages],
    reads: Reads,
    scores: Scores,
    want_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention as `base` says: out ``[B, H, T, D]``, lse ``[B, H, T]`` where it is wanted.

    Raises:
        ValueError: tensors, lengths or lists that do not fit each other.
        UnsupportedModeError: a block list made for other q and k.
    """
    check(NAME, q, segments, reads, scores)
    plain = [segment for segment in segments if isinstance(segment, Segment)]
    kv = [x for segment in plain for x in (segment.k, segment.v)]
    biases = [segment.bias for segment in plain if segment.bias is not None]
    one = q.shape[2] == 1 and isinstance(reads, ANY_LENGTHS)
    packed = [segment for segment in segments if not isinstance(segment, Segment)] if len(plain) < len(segments) else []
    if packed and all(isinstance(segment, Ragged) for segment in packed):
        return _ragged(q, segments, reads, scores, want_lse)
    if len(segments) == 1 and isinstance(segments[0], HeadPages):
        return _paged(q, segments[0], scores, want_lse)
    gradients = needs_grad(q, *kv, *biases)
    reason = _reason(q.device, q.dtype, q.shape[3], gradients)
    if packed:
        kinds = frozenset(piece.kind for piece in packed)
        reason = supports(Case(q.device, q.dtype, q.shape[3], gradients, type(reads), one, kinds))
    ours = reason is None and _computes(scores, q, kv)
    if packed and not ours:
        why = reason or "it takes no such shapes, dtypes or scale"
        raise UnsupportedModeError(
            f"kernel native does not unpack these keys and values: {why}. Call hf_longctx.kernels.base.attend, which "
            "reads them block by block."
        )
    if not ours or isinstance(reads, Averaged) or (biases and not one):
        other = reference if isinstance(reads, BlockList) and needs_grad(q, *kv) else cpu
        return other.attend(q, segments, reads, scores, want_lse)
    call = _Call(scores, want_lse)
    if one:
        return _decode(call, q, plain, packed, isinstance(segments[0], Quantised))
    if isinstance(reads, BlockList):
        return _listed(call, q, segments, reads)
    if isinstance(reads, Window):
        return _streaming(call, q, segments, reads)
    return call.run("dense", q, kv[0].shape[1], [int(isinstance(reads, Causal)), *call.segments(segments)])


def best_pages(q: Tensor, bounds: Sequence[Tensor], sub: int, width: int) -> Tensor | None:
    """See `base`.

    Raises:
        ValueError: bounds that do not fit the query.
    """
    batch, heads, q_len, dim = q.shape
    reason = _reason(q.device, q.dtype, dim, needs_grad(q))
    parts = sum(x.shape[2] for x in bounds)
    if reason is not None or any((x.dtype, x.device) != (q.dtype, q.device) for x in bounds):
        return None
    kv_heads = bounds[0].shape[1]
    if any((x.shape[0], x.shape[1], x.shape[3]) != (batch, kv_heads, 2 * dim) for x in bounds):
        _refuse(f"bounds {[list(x.shape) for x in bounds]} for queries {list(q.shape)}")
    if q_len != 1 or heads % kv_heads or parts % sub or not 0 < width <= parts // sub:
        _refuse(f"{width} pages to choose of {parts} parts, {sub} of each, for queries {list(q.shape)}")
    call = _Call(Scores(1.0), want_lse=False)
    chosen = torch.empty(batch, kv_heads, width, dtype=torch.int32)
    segments = call.segments([Segment(x, x, x.shape[2]) for x in bounds])
    call.run("pages", q, kv_heads, (sub, width, chosen.data_ptr(), *segments))
    return chosen


class Step(LayerStep):
    """See `base`."""

    NAME = NAME

    def __init__(self, heads: Sequence[RoleHeads]):
        super().__init__(heads, _library)


def _library() -> ctypes.CDLL:
    return _load()[0]


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
    except _native_build.ArchError as error:
        raise ConfigError(str(error)) from error
    except (_native_build.BuildError, OSError) as error:
        log.warning("no native CPU kernel, the slower cpu kernel (torch) runs instead: %s", error)
        return None, f"could not be built: {error}"
    if library.hf_longctx_width() < WIDTH:
        return None, "is slower than kernel cpu where there are neither AVX2 nor AVX-512 instructions"
    for name in ("decode", "dense", "streaming", "sparse", "step", "paged", "pages"):
        getattr(library, f"hf_longctx_{name}").argtypes = (c_int, c_double, c_double, c_void_p)
    library.hf_longctx_arch.restype = c_char_p
    if (start := openmp_start()) is not None:
        library.hf_longctx_share_threads(start)
    return library, None


class _Call:
    """One call into the library: its arguments as the int64 numbers of the structures in ``_native/vectors.h``.

    Built from ctypes structures they would take longer than a decoded token over a short window. Holds the tensors.
    """

    def __init__(self, scores: Scores, want_lse: bool) -> None:
        self.scores = scores
        self.want_lse = want_lse
        self.held: list[Tensor] = []

    def pointer(self, x: Tensor) -> int:
        self.held.append(x)
        return x.data_ptr()

    def heads(self, x: Tensor) -> tuple[int, ...]:
        """``Heads``: where ``x [B, heads, tokens, D]`` is, and its strides in bytes."""
        x = x if x.stride(-1) == 1 else x.contiguous()
        self.held.append(x)
        return heads_of(x)

    def segment(self, segment: Segment) -> tuple[int, ...]:
        """``Segment``; where rows differ, the length is the capacity, which bounds what is read."""
        lengths = 0
        bias = 0
        strides = (0, 0, 0)
        length = segment.longest
        if not 0 <= length <= min(segment.k.shape[2], segment.v.shape[2]):
            _refuse(f"{segment.k.shape[2]} keys and {segment.v.shape[2]} values for a length of {length}")
        if isinstance(segment.length, Tensor):
            lengths = self.lengths(segment.length, segment.k)
        if segment.bias is not None:
            added = segment.bias.float()[(None,) * (4 - segment.bias.dim())]
            added = added.expand(segment.k.shape[0], segment.k.shape[1], 1, segment.longest)
            bias = self.pointer(added)
            strides = (added.stride(0), added.stride(1), added.stride(3))
        return *self.heads(segment.k), *self.heads(segment.v), length, lengths, bias, *strides

    def lengths(self, lengths: Tensor, k: Tensor) -> int:
        if lengths.shape != k.shape[:1] or lengths.device != k.device:
            _refuse(f"lengths {list(lengths.shape)} on {lengths.device} for keys {list(k.shape)} on {k.device}")
        return self.pointer(lengths.to(torch.int64).contiguous())

    def piece(self, piece: Quantised, q: Tensor) -> tuple[int, ...]:
        """``Quantised``"""
        _check_piece(piece, q)
        tensors = (piece.k, piece.k_scale.flatten(3), piece.v, piece.v_scale)
        length = piece.length(0, piece.longest)
        lengths = 0
        if isinstance(length, Tensor):
            length, lengths = piece.longest, self.lengths(length, piece.k)
        return *(number for x in tensors for number in self.heads(x)), length, lengths, piece.bits, piece.group

    def segments(self, segments: list[Segment]) -> list[int]:
        """How many, and each of them."""
        return [len(segments), *(number for segment in segments for number in self.segment(segment))]

    def first_bias(self, heads: int) -> int:
        bias = self.scores.first_bias
        if bias is None:
            return 0
        if bias.shape != (heads,) or bias.device.type != "cpu":
            _refuse(f"a bias {list(bias.shape)} on {bias.device} for {heads} query heads")
        return self.pointer(bias.float().contiguous())

    def run(self, name: str, q: Tensor, kv_heads: int, arguments: Iterable[int]) -> tuple[Tensor, Tensor | None]:
        """(out ``[B, H, T, D]``, a view of ``[B, T, H, D]``, the layout that models want, lse ``[B, H, T]``)."""
        batch, heads, q_len, dim = q.shape
        out = q.new_empty(batch, q_len, heads, dim).transpose(1, 2)
        lse = q.new_empty(batch, heads, q_len, dtype=torch.float32) if self.want_lse else None
        shape = (batch, heads, kv_heads, q_len, dim, torch.get_num_threads())
        extra = (0 if lse is None else lse.data_ptr(), self.first_bias(heads))
        packed = array("q", (*shape, *self.heads(q), *self.heads(out), *extra, *arguments))
        function = getattr(_load()[0], f"hf_longctx_{name}")
        scores = self.scores
        used = function(q.dtype == torch.bfloat16, scores.scale, scores.softcap or 0, packed.buffer_info()[0])
        if used < 0:
            outside = _native_pages.WHY if name == "paged" else _native_ragged.WHY
            _refuse(outside if used == _native_ragged.OUTSIDE else f"{heads} query heads for {kv_heads} KV heads")
        if not used:
            raise MemoryError(f"kernel native: no memory for the temporaries of {name}")
        return out, lse


def _refuse(what: str) -> NoReturn:
    """The library reads where it is told to: what does not fit would end the process, or give another answer."""
    raise ValueError(f"kernel native was given {what}: they do not belong together. Use what the cache returned.")


def _check_piece(piece: Quantised, q: Tensor) -> None:
    slots = piece.slots
    dim = q.shape[3]
    heads = piece.k.shape[1]
    if piece.bits not in (4, 8) or piece.group < 1 or slots % piece.group or not 0 <= piece.longest <= slots:
        _refuse(f"{slots} slots of {piece.bits} bits in groups of {piece.group} for a length of {piece.longest}")
    if piece.by_row is None and len(set(piece.lengths)) > 1:
        _refuse(f"lengths {piece.lengths} that are not on the device")
    expected = Quantised.shapes((q.shape[0], heads), dim, dim, slots, piece.bits, piece.group, q.dtype)
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


def _computes(scores: Scores, q: Tensor, kv: Sequence[Tensor]) -> bool:
    """Whether the library takes these tensors and numbers."""
    batch = q.shape[0]
    kv_heads = kv[0].shape[1] if kv else 0
    dim = q.shape[3]
    if kv and (not kv_heads or q.shape[1] % kv_heads):
        _refuse(f"{q.shape[1]} query heads for {kv_heads} KV heads")
    for x in kv:
        if x.dtype != q.dtype or x.device != q.device or (x.shape[0], x.shape[1], x.shape[3]) != (batch, kv_heads, dim):
            return False
    return q.numel() > 0 and takes_scale(scores.scale) and (scores.softcap is None or scores.softcap > 0)


def _decode(
    call: _Call, q: Tensor, plain: Sequence[Segment], packed: Sequence[Quantised], begins_packed: bool
) -> tuple[Tensor, Tensor | None]:
    """One query over plain segments, and over packed ones, unpacked tile by tile."""
    numbers = [*call.segments(plain), len(packed)]
    if not packed:
        return call.run("decode", q, plain[0].k.shape[1], [*numbers, 0, 0])
    kv_heads = {segment.k.shape[1] for segment in (*plain, *packed)}
    if len(kv_heads) != 1:
        _refuse(f"segments of {sorted(kv_heads)} KV heads")
    numbers += [number for piece in packed for number in call.piece(piece, q)]
    return call.run("decode", q, *kv_heads, [*numbers, int(begins_packed), 0])


def _ragged(
    q: Tensor, segments: Sequence[Segment | Ragged], reads: Reads, scores: Scores, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """One query over plain and ragged segments; several queries, or a bias of the first token, in several calls."""
    if scores.first_bias is not None:
        return _first_token.attend(q, segments, reads, scores, attend)
    if q.shape[2] > 1:
        own = partial(attend, reads=ALL, scores=scores)
        parts = (lambda q, part: own(q, [part]), lambda plain: attend(q, plain, reads, scores))
        return _by_head.attend(q, segments, *parts)
    plain = [one for one in segments if isinstance(one, Segment)]
    ragged = [one for one in segments if isinstance(one, Ragged)]
    kv = [x for segment in plain for x in (segment.k, segment.v)]
    reason = _reason(q.device, q.dtype, q.shape[3], needs_grad(q, *kv))
    if reason is not None or not _computes(scores, q, kv) or not all(_native_ragged.fits(one, q) for one in ragged):
        return cpu.attend(q, segments, reads, scores, want_lse)
    kv_heads = kv[0].shape[1] if kv else ragged[0].form[1]
    for one in ragged:
        if (why := _native_ragged.misfit(one, q.shape[0], kv_heads)) is not None:
            _refuse(why)
    call = _Call(scores, want_lse)
    numbers = (number for one in ragged for number in _native_ragged.numbers(one))
    return call.run("decode", q, kv_heads, [*call.segments(plain), 0, 0, len(ragged), *numbers])


def _paged(q: Tensor, pages: HeadPages, scores: Scores, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """One query of each sequence over its own pages."""
    reason = _reason(q.device, q.dtype, q.shape[3], needs_grad(q))
    if reason is not None or not (_computes(scores, q, ()) and _native_ragged.fits(pages, q)):
        return cpu.attend(q, list(pages.blocks()), ALL, scores, want_lse)
    if (why := _native_pages.misfit(pages, q)) is not None:
        _refuse(why)
    return _Call(scores, want_lse).run("paged", q, len(pages.heads), _native_pages.numbers(pages))


def _streaming(call: _Call, q: Tensor, segments: Sequence[Segment], reads: Window) -> tuple[Tensor, Tensor | None]:
    """Without temporaries."""
    sinks, band = segments
    seen = reads.first + band.longest
    if reads.recent < 1 or not sinks.longest <= reads.first or q.shape[2] > seen:
        _refuse(
            f"a window of {reads.recent}, {sinks.longest} sinks and a band from {reads.first} to {seen} for "
            f"{q.shape[2]} queries"
        )
    numbers = (number for segment in segments for number in call.segment(segment))
    return call.run("streaming", q, band.k.shape[1], (reads.first, reads.recent, *numbers))


def _listed(call: _Call, q: Tensor, segments: Sequence[Segment], blocks: BlockList) -> tuple[Tensor, Tensor | None]:
    """The segments are read where they lie."""
    _check_lists(blocks, q)
    tensors = (blocks.indices, blocks.counts, blocks.columns, blocks.column_counts)
    sizes = (blocks.counts.shape[1], blocks.indices.shape[2], blocks.indices.shape[3], blocks.columns.shape[2])
    pointers = (call.pointer(x.to(torch.int32).contiguous()) for x in tensors)
    made = (blocks.block, blocks.first, blocks.kv_len, *sizes, *pointers)
    return call.run("sparse", q, segments[0].k.shape[1], (*made, *call.segments(segments)))
