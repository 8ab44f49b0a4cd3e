"""The truth every fast kernel is tested against: plain torch, whole score matrices, short enough to check by eye.

Shapes: ``B`` batch, ``H`` query heads, ``n`` KV heads, ``G = H // n`` (query head h reads KV head h // G), ``T`` query
tokens, ``S`` key tokens, ``D`` head_dim. Memory is O(T * S), but for `sparse_prefill`: for tests and short prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout.blocks import BlockList
from ..layout.pieces import pieces
from ..layout.segments import Segment

NAME = "reference"
PREFERENCE = 0

PIECE = 512  # queries, those of all heads of a group together, per mask of `sparse_prefill`


def supports(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> str | None:
    """None when this kernel computes the case, otherwise why it does not."""
    return None if dtype.is_floating_point else f"{dtype} is not a floating point type"


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
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of q ``[B, H, T, D]`` over the visible ones of k, v ``[B, n, S, D]``.

    ``visible`` is bool, broadcastable to ``[B, H, T, S]`` (None: every key); ``bias`` is added to the scaled scores,
    broadcastable to the same shape. Low precision is computed in float32. Returns out ``[B, H, T, D_v]`` in the dtype
    of q and the natural log of the softmax denominator, lse ``[B, H, T]``, in the dtype of the computation. A query
    that sees nothing gives out 0 and lse -inf.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.to(dtype) @ k.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias.to(dtype)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    sees = (scores > float("-inf")).any(-1, keepdim=True)
    # The row maximum cancels, so it is detached; it is 0 where a query sees nothing, because -inf - -inf is NaN.
    top = scores.detach().amax(-1, keepdim=True).masked_fill(~sees, 0) if scores.shape[-1] else sees.to(dtype)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True).masked_fill(~sees, 1)
    lse = (total.log() + top).masked_fill(~sees, float("-inf"))
    return ((weights @ v) / total).to(q.dtype), lse.squeeze(-1)


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
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


def dense_prefill(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention ``[B, H, T, D]``, the queries being the last T of the S tokens of k, v ``[B, n, S, D]``."""
    return attention(q, k, v, causal_visible(q.shape[2], k.shape[2], q.device), scale)[0]


def streaming_prefill(
    q: Tensor, sink_k: Tensor, sink_v: Tensor, k: Tensor, v: Tensor, *, recent: int, first: int, scale: float
) -> Tensor:
    """StreamingLLM attention (arXiv:2309.17453): the first ``s`` tokens of the row and the last ``recent`` ones.

    sink_k, sink_v ``[B, n, s, D]`` are the row positions 0..s-1, k, v ``[B, n, N, D]`` the positions first..first+N-1,
    where first >= s; the queries are the last T row positions up to first+N-1. Query i reads the sinks r <= i and, of
    the band, the positions j <= i with i - j < recent.
    """
    sink, band, q_len = sink_k.shape[2], k.shape[2], q.shape[2]
    position = torch.cat([torch.arange(sink), torch.arange(first, first + band)]).to(q.device)
    i = torch.arange(first + band - q_len, first + band, device=q.device)[:, None]
    visible = (position <= i) & ((position < sink) | (i - position < recent))
    return attention(q, torch.cat([sink_k, k], 2), torch.cat([sink_v, v], 2), visible, scale)[0]


def dense_prefill_segments(q: Tensor, segments: list[Segment], scale: float) -> Tensor:
    """Causal attention ``[B, H, T, D]`` whose queries are the last T tokens of the last segment; all see the others.

    Where a length differs by row, the queries of that row are the last T tokens of its own length.
    """
    parts = []
    for segment in segments:
        k, v = segment.kept()
        slot = torch.arange(k.shape[2], device=q.device)
        end = torch.as_tensor(segment.length, device=q.device).view(-1, 1, 1, 1)
        filled = slot[:, None] < end  # [B or 1, 1, longest, 1]
        # Slots past a row's length are uninitialised memory, and 0 * NaN is NaN.
        k, v = k.masked_fill(~filled, 0), v.masked_fill(~filled, 0)
        visible = slot < end
        if segment is segments[-1]:
            visible = slot <= end - q.shape[2] + torch.arange(q.shape[2], device=q.device)[:, None]
        bias = segment.bias
        if bias is not None:
            bias = bias.broadcast_to(*k.shape[:2], 1, k.shape[2]).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        parts.append(attention(q, k, v, visible, scale, bias))
    return merge(parts)[0]


def decode(q: Tensor, segments: list[Segment], scale: float) -> Tensor:
    """Attention ``[B, H, 1, D]`` of one token, the last of the last segment, over every kept key of every segment."""
    return dense_prefill_segments(q, segments, scale)


def sparse_prefill(q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scale: float) -> Tensor:
    """Attention ``[B, H, T, D]`` that reads what ``blocks`` lists, the queries being the last T of S tokens.

    KV head by KV head and in pieces of queries, so that no mask holds more than ``PIECE * S`` entries per row.
    """
    group, lists = q.shape[1] // k.shape[1], blocks.counts.shape[1]
    outs = []
    for head in range(k.shape[1]):
        own, parts = slice(head * group, (head + 1) * group), []
        listed = slice(head * lists // k.shape[1], (head + 1) * lists // k.shape[1])
        for some in pieces(q.shape[2], group, PIECE):
            low, high = some.start, some.stop
            seen = blocks.first + high
            visible = blocks.visible(low, high, listed)[..., :seen]
            visible = visible.repeat_interleave(group // visible.shape[1], 1)
            keys, values = k[:, head : head + 1, :seen], v[:, head : head + 1, :seen]
            with torch.autocast(q.device.type, enabled=False):  # it would round the scores
                parts.append(attention(q[:, own, low:high], keys, values, visible, scale)[0])
        outs.append(torch.cat(parts, 2))
    return torch.cat(outs, 1)
