"""Cached tokens by their row position, wherever they lie: what selections score and what gathering kernels read.

Shapes: ``B`` sequences that begin at one slot, ``n`` KV heads, ``W`` tokens per KV head, ``D`` head_dim. Segments are
those of a `HeadKV.alone`: without pads, each of one length for all sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .blocks import BlockList
from .pieces import pieces
from .segments import Segment
from .streamed import Streamed

TEMPORARY = 1 << 20  # numbers of the keys that are copied at once


def tokens_in(segments: Sequence[Segment | Streamed]) -> int:
    """How many tokens the segments hold."""
    return sum(segment.longest for segment in segments)


def keys(segments: Sequence[Segment | Streamed], low: int, high: int) -> Tensor:
    """Keys ``[B, n, high - low, D]`` at the row positions ``low .. high``: a view where they lie in one segment."""
    return _together([k for k, _ in spans(segments, low, high)])


def keys_and_values(segments: Sequence[Segment | Streamed], low: int, high: int) -> tuple[Tensor, Tensor]:
    """As `keys`, and the values beside them ``[B, n, high - low, D_v]``."""
    k, v = zip(*spans(segments, low, high), strict=True)
    return _together(k), _together(v)


def spans(segments: Sequence[Segment | Streamed], low: int, high: int) -> Iterator[tuple[Tensor, Tensor]]:
    """k, v of the row positions ``low .. high``, segment by segment."""
    begin = 0
    for segment in segments:
        end = begin + segment.longest
        if begin < high and low < end:
            a, b = max(low, begin) - begin, min(high, end) - begin
            plain = isinstance(segment, Segment)
            yield (segment.k[:, :, a:b], segment.v[:, :, a:b]) if plain else segment.span(a, b)
        begin = end


def _together(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 2)


def key_pieces(
    segments: Sequence[Segment | Streamed], low: int, high: int, multiple: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """(position of the first, keys ``[B, n, N, D]``) of the row positions ``low .. high``, in order and in pieces.

    Each piece but the last has a multiple of ``multiple`` tokens. It is only valid until the next is requested.
    """
    batch, heads, _, dim = shape_of(segments)
    for some in pieces(-(-(high - low) // multiple), batch * heads * dim * multiple, TEMPORARY):
        first = low + some.start * multiple
        yield first, keys(segments, first, min(low + some.stop * multiple, high))


def shape_of(segments: Sequence[Segment | Streamed]) -> tuple[int, int, int, int]:
    """B, n, the tokens of all segments, D."""
    first = segments[0]
    batch, heads, dim = (
        (first.k.shape[0], first.k.shape[1], first.k.shape[3]) if isinstance(first, Segment) else first.form
    )
    return batch, heads, tokens_in(segments), dim


def take(segments: Sequence[Segment | Streamed], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of k, v ``[B, n, W, D]`` at the row positions ``tokens [B, n, W]``, int64; nothing else is read."""
    return _taken(segments, tokens, 2)


def take_keys(segments: Sequence[Segment | Streamed], tokens: Tensor) -> Tensor:
    """`take` without the values, which streamed segments alone read as well."""
    return _taken(segments, tokens, 1)[0]


def _taken(segments: Sequence[Segment | Streamed], tokens: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The first ``parts`` of k, v at these positions."""
    filled = [segment for segment in segments if segment.longest]
    found = None
    begin = 0
    for segment in filled:
        at = (tokens - begin).clamp(0, segment.longest - 1)
        here = None if len(filled) == 1 else (tokens >= begin) & (tokens < begin + segment.longest)
        if isinstance(segment, Segment):
            own = [x.gather(2, at[..., None].expand(-1, -1, -1, x.shape[3])) for x in segment.contents()[:parts]]
        else:
            own = segment.take(at, here)[:parts]
        if found is None:
            found = own
        else:
            found = [torch.where(here[..., None], x, before) for x, before in zip(own, found, strict=True)]
        begin += segment.longest
    return tuple(found)


def listed_tokens(blocks: BlockList) -> tuple[Tensor, Tensor]:
    """Row positions int64 ``[B, lists, W]`` that the list of one query names, and which of them it reads, bool.

    What is not read is some position that exists.
    """
    last = blocks.first  # the position of the query
    listed = torch.arange(blocks.indices.shape[3], device=blocks.indices.device) < blocks.counts[:, :, 0, None]
    inside = torch.arange(blocks.block, device=listed.device)
    tokens = (blocks.indices[:, :, 0, :, None].long() * blocks.block + inside).flatten(2)
    named = listed.repeat_interleave(blocks.block, 2) & (tokens <= last)
    tokens = tokens.clamp(max=last)
    if not blocks.columns.shape[2]:
        return tokens, named
    columns = blocks.columns.long()
    read = torch.arange(columns.shape[2], device=listed.device) < blocks.column_counts[..., None]
    read &= columns < last // blocks.block * blocks.block
    read &= ~blocks.block_mask()[:, :, 0].gather(2, columns // blocks.block)
    return torch.cat([tokens, columns], 2), torch.cat([named, read], 2)


def lying(segments: Sequence[Segment | Streamed], blocks: BlockList) -> list[Segment] | None:
    """The segments as plain ones without a copy, of which what the lists of one query name can be read; else None."""
    tokens, _ = listed_tokens(blocks)
    left: list[Segment] = []
    begin = 0
    for segment in segments:
        if isinstance(segment, Segment):
            left.append(segment)
        else:
            own = tokens[(tokens >= begin) & (tokens < begin + segment.longest)] - begin
            if (found := segment.lying(own)) is None:
                return None
            left += found
        begin += segment.longest
    return left


def gathered(segments: Sequence[Segment | Streamed], blocks: BlockList) -> Segment:
    """What the lists of one query name, as one segment of ``n * L`` KV heads; L lists for each KV head.

    Its bias hides what a list does not read.
    """
    tokens, named = listed_tokens(blocks)
    heads = shape_of(segments)[1]
    k, v = take(segments, tokens.unflatten(1, (heads, -1)).flatten(2))
    lists = tokens.shape[1] // heads
    k, v = (x.unflatten(2, (lists, -1)).flatten(1, 2) for x in (k, v))
    bias = torch.zeros_like(named, dtype=k.dtype).masked_fill_(~named, float("-inf"))
    return Segment(k, v, k.shape[2], bias[:, :, None])
