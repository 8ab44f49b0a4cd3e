"""What the kernels ask of a call's arguments alike, and what they do to segments alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..errors import UnsupportedModeError
from ..layout.blocks import BlockList
from ..layout.reads import All, Causal, Reads
from ..layout.scores import Scores
from ..layout.segments import Segment

ANY_LENGTHS = (All, Causal)  # reads that no row position is counted for; a tuple: a union is made anew at each use
PLAIN = "reads plain segments alone"  # why a case is refused whose segments are not


def check(kernel: str, q: Tensor, segments: Sequence[Segment], reads: Reads, scores: Scores) -> None:
    """Refuse what `Kernel.attend` would leave out or misread, for all kernels but the reference.

    Raises:
        ValueError: sinks, which the caller adds; biases or lengths per sequence where reads count row positions; a
            window that is not over sinks and a band.
        UnsupportedModeError: a block list made for other queries or keys.
    """
    if scores.sinks is not None:
        raise ValueError(f"kernel {kernel} adds no sinks: call hf_longctx.kernels.base.attend, which does.")
    if isinstance(reads, ANY_LENGTHS):
        return
    name = type(reads).__name__
    if any(not isinstance(one, Segment) or one.bias is not None or not isinstance(one.length, int) for one in segments):
        raise ValueError(
            f"kernel {kernel} reads a {name} of segments without a bias, of one length for all sequences. Call it "
            "sequence by sequence, or use kernel: reference."
        )
    if isinstance(reads, BlockList):
        check_list(q, segments, reads)
    elif len(segments) != 2:
        raise ValueError(f"a {name} is read from two segments, the sinks and the band, not from {len(segments)}.")


def check_reads(kernel: str, known: frozenset[type], reads: Reads) -> None:
    """Refuse reads that are not among those that a kernel computes.

    Raises:
        UnsupportedModeError: they are not; `base.attend` would have taken another kernel.
    """
    if type(reads) not in known:
        names = ", ".join(sorted(one.__name__ for one in known))
        raise UnsupportedModeError(
            f"kernel {kernel} was given {type(reads).__name__} to read and computes {names}. Call "
            "hf_longctx.kernels.base.attend, which takes another kernel for it."
        )


def check_list(q: Tensor, segments: Sequence[Segment], blocks: BlockList) -> None:
    """Refuse a block list made for other queries or keys.

    Raises:
        UnsupportedModeError: it was.
    """
    queries = blocks.kv_len - blocks.first
    lists = blocks.counts.shape[1]
    kv_heads = segments[0].k.shape[1]
    tokens = sum(segment.longest for segment in segments)
    if q.shape[2] != queries or tokens < blocks.kv_len or lists not in (q.shape[1], kv_heads):
        raise UnsupportedModeError(
            f"sparse prefill was given {q.shape[1]} heads of {q.shape[2]} queries, {kv_heads} of {tokens} keys, with "
            f"{lists} lists for {queries} queries and {blocks.kv_len} keys. Make the BlockList for this q and k."
        )


def part_of(segment: Segment, low: int, high: int | None = None) -> Segment:
    """The slots ``low .. high`` (None: to the end) in the same memory."""
    high = segment.k.shape[2] if high is None else high
    bias = segment.bias
    length = segment.length
    if bias is not None and bias.dim() and bias.shape[-1] > 1:
        bias = bias[..., low:high]
    clamped = length.clamp(low, high) - low if isinstance(length, Tensor) else min(max(length, low), high) - low
    return replace(segment, k=segment.k[:, :, low:high], v=segment.v[:, :, low:high], length=clamped, bias=bias)
