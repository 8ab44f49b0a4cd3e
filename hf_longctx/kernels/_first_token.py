"""The bias of the first token's score, for a kernel that has none: that token is read apart, and merged by logsumexp.

Nothing is subtracted, so nothing cancels. Of a block list the whole first block is read apart.

Shapes: ``B`` batch, ``H`` query heads, ``n`` KV heads, ``T`` queries, ``D`` head_dim, ``L`` lists, ``NQ`` query blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..layout.blocks import BlockList
from ..layout.pieces import pieces
from ..layout.ragged import Ragged
from ..layout.reads import ALL, All, Causal, Reads, Window
from ..layout.scores import Scores
from ..layout.segments import Segment, joined
from ._arguments import part_of
from .reference import attention, merge

TEMPORARY = 1 << 20  # elements of a mask over the first block

Attend = Callable[[Tensor, Sequence[Segment], Reads, Scores], tuple[Tensor, Tensor]]


def attend(
    q: Tensor, segments: Sequence[Segment], reads: All | Causal | Window | BlockList, scores: Scores, plain: Attend
) -> tuple[Tensor, Tensor]:
    """(out ``[B, H, T, D]``, lse ``[B, H, T]``) with ``scores.first_bias``, by ``plain`` that takes none."""
    bare = Scores(scores.scale, scores.softcap)
    if isinstance(reads, BlockList):
        parts = [_first_block(q, segments, reads, scores), plain(q, segments, _without_first_block(reads), bare)]
    elif isinstance(reads, Window):
        parts = _window(q, segments, reads, scores, bare, plain)
    else:
        parts = _dense(q, segments, reads, scores, bare, plain)
    wide = [(out.to(lse.dtype), lse) for out, lse in parts]
    out, lse = merge(wide)
    return out.to(q.dtype), lse


def _token(q: Tensor, segment: Segment, scores: Scores, bare: Scores, plain: Attend) -> tuple[Tensor, Tensor]:
    """(out, lse) over slot 0 of a segment; of one key, the logsumexp is its score."""
    out, lse = plain(q, [part_of(segment, 0, 1)], ALL, bare)
    return out, lse + scores.first_bias.to(lse.dtype)[:, None]


def _dense(
    q: Tensor, segments: Sequence[Segment], reads: All | Causal, scores: Scores, bare: Scores, plain: Attend
) -> list[tuple[Tensor, Tensor]]:
    filled = [one for one in segments[:-1] if isinstance(one, Ragged) or one.longest] + [segments[-1]]
    first = filled[0]
    if isinstance(first, Ragged):
        token, rest = first.first_apart()
        return [_token(q, token, scores, bare, plain), plain(q, [rest, *filled[1:]], reads, bare)]
    if not first.longest:
        return [plain(q, filled, reads, bare)]
    out, lse = _token(q, first, scores, bare, plain)
    if len(filled) == 1 and isinstance(reads, Causal) and isinstance(first.length, Tensor):
        slots = first.length[:, None] - q.shape[2] + torch.arange(q.shape[2], device=q.device)
        lse = lse.masked_fill((slots < 0)[:, None], float("-inf"))
    rest = part_of(first, 1)
    return [(out, lse), plain(q, [rest, *filled[1:]], reads, bare)]


def _window(
    q: Tensor, segments: Sequence[Segment], reads: Window, scores: Scores, bare: Scores, plain: Attend
) -> list[tuple[Tensor, Tensor]]:
    sinks, band = segments
    if sinks.longest:
        return [_token(q, sinks, scores, bare, plain), plain(q, [part_of(sinks, 1), band], reads, bare)]
    if reads.first or not band.longest:
        return [plain(q, segments, reads, bare)]
    out, lse = _token(q, band, scores, bare, plain)
    position = torch.arange(band.longest - q.shape[2], band.longest, device=q.device)
    lse = lse.masked_fill(position >= reads.recent, float("-inf"))
    return [(out, lse), plain(q, [sinks, part_of(band, 1)], replace(reads, first=1), bare)]


def _first_block(q: Tensor, segments: Sequence[Segment], blocks: BlockList, scores: Scores) -> tuple[Tensor, Tensor]:
    """(out, lse) over what the lists read of the first ``block`` tokens."""
    k, v = _first_tokens(segments, min(blocks.block, blocks.kv_len))
    bias = torch.zeros(q.shape[1], 1, k.shape[2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    bias[:, 0, 0] = scores.first_bias.to(bias.dtype)
    listed = _lists_first(blocks)
    columns = blocks.column_mask()[..., : k.shape[2]]
    parts = []
    for some in pieces(q.shape[2], q.shape[0] * q.shape[1] * k.shape[2], TEMPORARY):
        i = torch.arange(blocks.first + some.start, blocks.first + some.stop, device=q.device)
        own = i // blocks.block
        visible = listed[:, :, own - blocks.first // blocks.block, None] | (columns[:, :, None] & (own > 0)[:, None])
        visible = visible & (torch.arange(k.shape[2], device=q.device) <= i[:, None])
        visible = visible.repeat_interleave(q.shape[1] // visible.shape[1], 1)
        parts.append(attention(q[:, :, some], k, v, visible, scores.scale, bias, scores.softcap))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _first_tokens(segments: Sequence[Segment], count: int) -> tuple[Tensor, Tensor]:
    cut = []
    left = count
    for segment in segments:
        cut.append(part_of(segment, 0, min(left, segment.longest)))
        left -= cut[-1].longest
    return joined([one for one in cut if one.longest] or cut[:1])


def _lists_first(blocks: BlockList) -> Tensor:
    """Bool ``[B, L, NQ]``: which query blocks list the first key block."""
    if not blocks.indices.shape[3]:
        return torch.zeros_like(blocks.counts, dtype=torch.bool)
    return (blocks.counts > 0) & (blocks.indices[..., 0] == 0)


def _without_first_block(blocks: BlockList) -> BlockList:
    """The list without its first key block, and without the columns in it."""
    dropped = _lists_first(blocks).to(blocks.counts.dtype)
    in_first = torch.arange(blocks.columns.shape[2], device=blocks.columns.device) < blocks.column_counts[..., None]
    in_first = (in_first & (blocks.columns < blocks.block)).sum(-1, dtype=blocks.column_counts.dtype)
    return replace(
        blocks,
        indices=_without_start(blocks.indices, blocks.counts, dropped),
        counts=blocks.counts - dropped,
        columns=_without_start(blocks.columns, blocks.column_counts, in_first),
        column_counts=blocks.column_counts - in_first,
    )


def _without_start(places: Tensor, counts: Tensor, dropped: Tensor) -> Tensor:
    """``places [..., M]`` without the first ``dropped [...]`` of the first ``counts [...]``; 0 after the rest."""
    if not places.shape[-1]:
        return places
    at = torch.arange(places.shape[-1], device=places.device)
    moved = places.gather(-1, (at + dropped[..., None]).clamp(max=places.shape[-1] - 1).long())
    return moved.masked_fill(at >= (counts - dropped)[..., None], 0)
