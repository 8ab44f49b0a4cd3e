"""The truth every fast kernel is tested against: plain torch, whole score matrices, short enough to check by eye.

Shapes: ``B`` batch, ``H`` query heads, ``n`` KV heads, ``G = H // n`` (query head h reads KV head h // G), ``T`` query
tokens, ``S`` key tokens, ``D`` head_dim. Memory is O(T * S), but for block lists: for tests and short prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..layout.blocks import BlockList
from ..layout.pieces import pieces
from ..layout.ragged import KIND, Ragged
from ..layout.reads import All, Averaged, Causal, Reads, Window
from ..layout.scores import Scores
from ..layout.segments import Segment

if TYPE_CHECKING:
    from .base import Case

NAME = "reference"
PREFERENCE = 0
READS = frozenset({All, Causal, Window, Averaged, BlockList})

PIECE = 512  # queries, those of all heads of a group together, per mask of a block list


def supports(case: Case) -> str | None:
    """None when this kernel computes the case, otherwise why it does not."""
    if case.kinds and (case.kinds != {KIND} or case.reads not in (All, Causal) or case.device.type != "cpu"):
        return "reads plain segments, and ragged ones on the CPU with All and Causal, alone"
    return None if case.dtype.is_floating_point else f"{case.dtype} is not a floating point type"


def attend(
    q: Tensor, segments: Sequence[Segment], reads: Reads, scores: Scores, want_lse: bool = True
) -> tuple[Tensor, Tensor]:
    """Attention as `base` says, ``(out [B, H, T, D_v], lse [B, H, T])``, sinks included. Differentiable, any device."""
    with torch.autocast(q.device.type, enabled=False):  # it would round the scores
        whole = [_padded(one) if isinstance(one, Ragged) else one for one in segments]
        k, v, bias = _joined(q, whole)
        if scores.first_bias is not None and k.shape[2]:
            added = torch.zeros_like(bias)
            added[..., 0] = _first_keys(segments, reads, q.shape[1])
            bias = bias + added * scores.first_bias.to(bias.dtype)[:, None, None]
        if isinstance(reads, BlockList):
            return _listed(q, k, v, reads, scores, bias)
        visible = _visible(q, whole, reads)
        if isinstance(reads, Averaged):
            return _averaged(q, k, v, visible, segments, reads, scores, bias)
        return attention(q, k, v, visible, scores.scale, bias, scores.softcap, scores.sinks)


def causal_visible(q_len: int, kv_len: int, device: torch.device | None = None) -> Tensor:
    """Bool ``[q_len, kv_len]``: the keys each query reads; queries are the last ``q_len`` of ``kv_len`` tokens."""
    i = torch.arange(kv_len - q_len, kv_len, device=device)[:, None]
    return torch.arange(kv_len, device=device) <= i


def streaming_visible(q_len: int, kv_len: int, sink: int, recent: int, device: torch.device | None = None) -> Tensor:
    """Bool ``[q_len, kv_len]``: j <= i and (j < sink or i - j < recent), StreamingLLM (arXiv:2309.17453)."""
    i = torch.arange(kv_len - q_len, kv_len, device=device)[:, None]
    j = torch.arange(kv_len, device=device)
    return (j <= i) & ((j < sink) | (i - j < recent))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of q ``[B, H, T, D]`` over the visible ones of k, v ``[B, n, S, D]``.

    ``visible`` is bool, broadcastable to ``[B, H, T, S]`` (None: every key); ``bias`` is added to the scaled and capped
    scores, broadcastable to the same shape; ``sinks [H]`` are logits without a value. Low precision is computed in
    float32. Returns out ``[B, H, T, D_v]`` in the dtype of q and the natural log of the softmax denominator, lse
    ``[B, H, T]``, in the dtype of the computation. A query that reads nothing gives out 0 and lse -inf.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))
    scores = capped(q.to(dtype) @ k.transpose(-1, -2) * scale, softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)], -1)
        v = torch.cat([v, v.new_zeros(*v.shape[:2], 1, v.shape[3])], 2)
    sees = (scores > float("-inf")).any(-1, keepdim=True)
    # The row maximum cancels, so it is detached; it is 0 where a query sees nothing, because -inf - -inf is NaN.
    top = scores.detach().amax(-1, keepdim=True).masked_fill(~sees, 0) if scores.shape[-1] else sees.to(dtype)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True).masked_fill(~sees, 1)
    lse = (total.log() + top).masked_fill(~sees, float("-inf"))
    return ((weights @ v) / total).to(q.dtype), lse.squeeze(-1)


def page_scores(q: Tensor, bounds: Tensor) -> Tensor:
    """The most that q ``[B, H, 1, D]`` times a key of each page can be, ``[B, H, P]``, in float32 or wider.

    Quest, arXiv:2406.10774. Each channel gives the larger of its products with the page's bounds: that with the largest
    number where q is positive, else that with the smallest.

    Args:
        bounds: the largest, then the smallest number of each channel, ``[B, n, P, 2 D]``.
    """
    return products(torch.cat([q.clamp(min=0), q.clamp(max=0)], 3), bounds)


def products(q: Tensor, k: Tensor) -> Tensor:
    """q ``[B, H, 1, D]`` times the keys ``[B, n, W, D]`` of its KV heads, ``[B, H, W]``, in float32 or wider."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q[:, :, 0].unflatten(1, (k.shape[1], -1)).to(dtype)
    return (grouped @ k.to(dtype).transpose(2, 3)).flatten(1, 2)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """``softcap * tanh(scores / softcap)``; the scores themselves without a cap."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint sets of keys: (out ``[B, H, T, D]``, lse ``[B, H, T]``) pairs to one such pair.

    out = sum_p exp(lse_p - lse) out_p with lse = log(sum_p exp(lse_p)); a query that sees nothing anywhere stays 0 and
    -inf.
    """
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    top = lses.detach().amax(0)
    sees = top > float("-inf")
    top = top.masked_fill(~sees, 0)
    weights = (lses - top).exp()
    total = weights.sum(0).masked_fill(~sees, 1)
    out = sum(w[..., None] * part for w, (part, _) in zip(weights, parts, strict=True)) / total[..., None]
    return out.to(parts[0][0].dtype), (total.log() + top).masked_fill(~sees, float("-inf"))


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """(out ``[B, H, T, D]``, lse ``[B, H, T]``) with a logit per head, ``sinks [H]``, that has no value."""
    logits = sinks.to(lse.dtype)[:, None]
    # exp(lse - logaddexp(lse, logits)) of (out, lse); a query that reads nothing else has lse -inf and weight 0.
    share = torch.sigmoid(lse - logits)
    return (out * share[..., None]).to(out.dtype), torch.logaddexp(lse, logits.expand_as(lse))


def _padded(ragged: Ragged) -> Segment:
    """As a plain segment with the tokens of the longest head; a bias of -inf hides what the others have not."""
    shape = (*ragged.lengths.shape, ragged.longest)
    k, v = (x.new_zeros(*shape, x.shape[1]) for x in (ragged.k, ragged.v))
    bias = torch.full(shape, float("-inf"), dtype=torch.promote_types(k.dtype, torch.float32))
    for row, n in product(*map(range, ragged.lengths.shape)):
        own = ragged.head(row, n)
        k[row, n, : own.length], v[row, n, : own.length] = own.k[0, 0], own.v[0, 0]
        bias[row, n, : own.length] = 0 if own.bias is None else own.bias[0, 0, 0]
    return Segment(k, v, ragged.longest, bias[:, :, None])


def _joined(q: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, Tensor, Tensor]:
    """k, v ``[B, n, S, D]`` of all segments, zeros past each length, and what is added to scores ``[B, H, 1, S]``."""
    keys = []
    values = []
    biases = []
    for segment in segments:
        k, v = segment.contents()
        empty = ~_filled(segment, q.device).transpose(2, 3)
        # Slots past a sequence's length are uninitialised memory, and 0 * NaN is NaN.
        keys.append(k.masked_fill(empty, 0))
        values.append(v.masked_fill(empty, 0))
        biases.append(_bias(segment, q))
    k = torch.cat(keys, 2)
    v = torch.cat(values, 2)
    return k, v, torch.cat(biases, 3)


def _first_keys(segments: Sequence[Segment | Ragged], reads: Reads, heads: int) -> Tensor:
    """Bool ``[B, H, 1]`` or scalar: whether the first key that there is, is the first token.

    A window without sinks may begin after it, and a KV head that keeps but some tokens may have lost it.
    """
    own = next((one for one in segments if isinstance(one, Ragged) or one.longest), None)
    if not isinstance(own, Ragged):
        return torch.tensor(not isinstance(reads, Window | Averaged) or bool(segments[0].longest) or reads.first == 0)
    shape = own.lengths.shape
    has = [bool((own.positions[own.of_head(row, n)][:1] == 0).any()) for row, n in product(*map(range, shape))]
    return torch.tensor(has).view(shape).repeat_interleave(heads // shape[1], 1)[..., None]


def _bias(segment: Segment, q: Tensor) -> Tensor:
    """Of a segment's scores, ``[B, H, 1, longest]``."""
    batch, heads = segment.k.shape[:2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    bias = torch.zeros((), dtype=dtype, device=q.device) if segment.bias is None else segment.bias.to(dtype)
    return bias.broadcast_to(batch, heads, 1, segment.longest).repeat_interleave(q.shape[1] // max(heads, 1), 1)


def _filled(segment: Segment, device: torch.device) -> Tensor:
    """Bool ``[B or 1, 1, 1, longest]``."""
    return torch.arange(segment.longest, device=device) < _end(segment, device)


def _end(segment: Segment, device: torch.device) -> Tensor:
    return torch.as_tensor(segment.length, device=device).view(-1, 1, 1, 1)


def _visible(q: Tensor, segments: Sequence[Segment], reads: Reads) -> Tensor:
    """Bool ``[B or 1, 1, T, S]``, of all but block lists."""
    q_len = q.shape[2]
    device = q.device
    if isinstance(reads, Window | Averaged):
        return _visible_window(q, segments, reads)[None, None]
    parts = [_filled(segment, device) for segment in segments]
    if not isinstance(reads, All):
        own = segments[-1]
        slots = torch.arange(own.longest, device=device)
        parts[-1] = slots <= _end(own, device) - q_len + torch.arange(q_len, device=device)[:, None]
    batch = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(batch, 1, q_len, -1) for part in parts], 3)


def _visible_window(q: Tensor, segments: Sequence[Segment], reads: Window | Averaged) -> Tensor:
    """Bool ``[T, s + N]``: the sinks, then the band."""
    sink, band = (segment.longest for segment in segments)
    end = reads.first + band if isinstance(reads, Window) else reads.end
    i = torch.arange(end - q.shape[2], end, device=q.device)[:, None]
    j = torch.arange(reads.first, reads.first + band, device=q.device)
    edge = i - reads.recent + 1 if isinstance(reads, Window) else reads.edges[:, None]
    return torch.cat([torch.arange(sink, device=q.device) <= i, (j >= edge) & (j <= i)], 1)


def _averaged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    segments: Sequence[Segment],
    reads: Averaged,
    scores: Scores,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Each query's window and sinks, and the mean of what lies between as one more key."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide = q.to(dtype)
    group = q.shape[1] // k.shape[1]
    parts = [attention(wide, k, v, visible, scores.scale, bias, scores.softcap)]
    counts = reads.edges - reads.sink
    means = []
    for nth, band in enumerate(segments[1].contents()):
        before = band.new_zeros(*band.shape[:2], 1, band.shape[3], dtype=torch.float64)
        before = before if reads.dropped is None else reads.dropped[nth]
        sums = torch.cat([before, before + band.double().cumsum(2)], 2).index_select(2, reads.edges - reads.first)
        means.append((sums / counts.clamp(min=1)[:, None]).to(dtype).repeat_interleave(group, 1))
    score = capped((wide * means[0]).sum(-1) * scores.scale, scores.softcap) + counts.to(dtype).log()
    out, lse = merge([*parts, (means[1], score)])
    if scores.sinks is not None:
        out, lse = with_sinks(out, lse, scores.sinks)
    return out.to(q.dtype), lse


def _listed(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scores: Scores, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """KV head by KV head and in pieces of queries, so that no mask holds more than ``PIECE * S`` entries per row."""
    group = q.shape[1] // k.shape[1]
    lists = blocks.counts.shape[1]
    outs = []
    lses = []
    for head in range(k.shape[1]):
        own = slice(head * group, (head + 1) * group)
        parts = []
        listed = slice(head * lists // k.shape[1], (head + 1) * lists // k.shape[1])
        for some in pieces(q.shape[2], group, PIECE):
            low = some.start
            high = some.stop
            seen = blocks.first + high
            visible = blocks.visible(low, high, listed)[..., :seen]
            visible = visible.repeat_interleave(group // visible.shape[1], 1)
            keys = k[:, head : head + 1, :seen]
            values = v[:, head : head + 1, :seen]
            added = bias[:, own, :, :seen]
            sinks = None if scores.sinks is None else scores.sinks[own]
            parts.append(
                attention(q[:, own, low:high], keys, values, visible, scores.scale, added, scores.softcap, sinks)
            )
        out, lse = zip(*parts, strict=True)
        outs.append(torch.cat(out, 2))
        lses.append(torch.cat(lse, 2))
    return torch.cat(outs, 1), torch.cat(lses, 1)
