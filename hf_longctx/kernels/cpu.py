"""Fast attention in plain torch: SDPA calls shaped so that they stay on its flash path. Differentiable, any device.

Shapes: ``B`` batch, ``H`` query heads, ``n`` KV heads of one role, ``G = H // n`` (query head h reads KV head h // G),
``T`` query tokens, ``S`` key tokens, ``D`` head_dim. Three rules, each measured on CPU:

- Masks are small. A mask turns off SDPA's causal skipping, so none holds more than ``MASK_ROWS * S`` entries.
- The query heads of a group are folded into rows (q ``[B, n, G * T, D]``) wherever no causal flag is needed: K and V
  are then read once per KV head instead of once per query head (8 times faster in bfloat16 decode), and CUDA, where a
  mask together with ``enable_gqa`` means the T x S math path, keeps its fused kernels.
- Sets of keys are computed apart and joined by logsumexp where that saves a mask or a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ..errors import UnsupportedModeError
from ..layout.blocks import BlockList
from ..layout.dtypes import needs_grad
from ..layout.ragged import Ragged
from ..layout.reads import All, Averaged, Causal, Reads, Window
from ..layout.scores import Scores
from ..layout.segments import Segment, joined
from . import _by_head, _compensated, _few_cpu, _first_token, _sparse_cpu
from ._arguments import check
from .reference import attention, merge

if TYPE_CHECKING:
    from .base import Case

NAME = "cpu"
PREFERENCE = 10
READS = frozenset({All, Causal, Window, Averaged, BlockList})

MASK_ROWS = 512  # rows of the largest mask, group fold included
TILE_KEYS = 4096  # keys per step of `_tiled`
TEMPORARY = 1 << 20  # numbers per temporary: scores of `_tiled`, gathered keys of a window

# SDPA's own CPU kernel, called by its aten name because only there it also returns the logsumexp.
_flash_for_cpu = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def supports(case: Case) -> str | None:
    """None when this kernel computes the case, otherwise why it does not."""
    if case.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"scaled_dot_product_attention does not take {case.dtype}"
    if case.kinds:
        return _by_head.reason(case.kinds, case.reads, case.device)
    return _no_list(case.device, case.needs_grad) if case.reads is BlockList else None


def _no_list(device: torch.device, needs_grad: bool) -> str | None:
    """Why block lists are not computed."""
    if needs_grad:
        return "has no gradient of block lists: call the model under torch.no_grad() where none is wanted"
    return None if device.type == "cpu" else "reads block lists on the CPU alone"


def attend(
    q: Tensor, segments: Sequence[Segment], reads: Reads, scores: Scores, want_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Attention as `base` says: out ``[B, H, T, D_v]``, lse ``[B, H, T]``.

    Raises:
        ValueError: sinks, or segments that a window or a list cannot be read from.
        UnsupportedModeError: a block list for other q and k, or with gradients, or off the CPU.
    """
    check(NAME, q, segments, reads, scores)
    if isinstance(reads, Averaged):
        sinks, band = (segment.contents() for segment in segments)
        return _compensated.attend(q, sinks, band, reads, scores, want_lse)
    if scores.first_bias is not None:
        return _first_token.attend(q, segments, reads, scores, attend)
    if isinstance(reads, BlockList):
        return _listed(q, segments, reads, scores)
    if isinstance(reads, Window):
        return _streaming(q, segments, reads, scores, want_lse)
    return _dense(q, segments, reads, scores, want_lse)


def _dense(
    q: Tensor, segments: Sequence[Segment], reads: All | Causal, scores: Scores, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Over every key, or the queries being the last T tokens of the last segment, by each sequence's length."""
    if any(isinstance(segment, Ragged) for segment in segments):
        own = partial(with_lse, scores=scores)
        return _by_head.attend(q, segments, own, lambda plain: _dense(q, plain, reads, scores, True))
    *past, own = segments
    causal = isinstance(reads, Causal) and q.shape[2] > 1
    ragged = isinstance(own.length, Tensor)
    if not past and not want_lse and scores.softcap is None and q.numel() and own.longest:
        if causal and not ragged and own.bias is None:
            return _causal(q, *own.contents(), scores, False)
        if not causal and _takes_bias(q, own):
            return _folded(q, *_clean(own), scores.scale, _score_bias(own, q)), None
    last = _ragged(q, own, scores) if causal and ragged else with_lse(q, own, scores, causal)
    return merge([*(with_lse(q, segment, scores) for segment in past), last])


def _causal(q: Tensor, k: Tensor, v: Tensor, scores: Scores, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The queries being the last T of the S tokens of k, v ``[B, n, S, D]``."""
    q_len = q.shape[2]
    kv_len = k.shape[2]
    if want_lse or scores.softcap is not None or not q.numel() or kv_len < q_len:
        return _partial(q, k, v, scores, causal=True)
    if q_len == kv_len:
        return _square(q, k, v, scores.scale), None
    if q_len == 1:
        return _folded(q, k, v, scores.scale), None
    if _gives_lse(q, k, v):
        return _partial(q, k, v, scores, causal=True)
    rows = max(1, MASK_ROWS // (q.shape[1] // k.shape[1]))
    blocks = []
    for low in range(0, q_len, rows):
        high = min(low + rows, q_len)
        seen = kv_len - q_len + high
        visible = _causal_tile(slice(0, seen), seen, high - low, q.device)
        mask = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
        blocks.append(_folded(q[:, :, low:high], k[:, :, :seen], v[:, :, :seen], scores.scale, mask))
    return torch.cat(blocks, 2), None


def _streaming(
    q: Tensor, segments: Sequence[Segment], reads: Window, scores: Scores, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """In O(T * (s + recent)) time and bounded temporary memory.

    The first queries see all there is, a dense causal prefill. Every later one sees all sinks and exactly ``recent``
    keys, so blocks of queries differ only in where their band starts: they go to the batch dimension and share one
    small mask.
    """
    (sink_k, sink_v), (k, v) = (segment.contents() for segment in segments)
    batch, heads, q_len, dim = q.shape
    if not q.numel():
        return _tiled(q, k, v, scores)
    first = reads.first
    recent = reads.recent
    start = first + k.shape[2] - q_len  # row position of the first query
    head = min(max(first + recent - start, 0), q_len)
    parts = []
    if head:
        seen = start + head - first
        keys = k[:, :, :seen]
        values = v[:, :, :seen]
        if sink_k.shape[2]:
            keys = torch.cat([sink_k, keys], 2)
            values = torch.cat([sink_v, values], 2)
        out, lse = _causal(q[:, :, :head], keys, values, scores, want_lse)
        parts.append((out.transpose(1, 2), lse))
    rows = _block_rows(heads // k.shape[1])
    width = batch * k.shape[1] * (sink_k.shape[2] + recent + rows) * dim
    step = rows * min(64, max(1, TEMPORARY // width))
    low = head
    room = {}
    while low < q_len:
        left = q_len - low
        high = low + (min(step, left // rows * rows) or left)
        rows = min(rows, left)
        band = slice(start + low - first - recent + 1, start + high - first)
        own = (k[:, :, band], v[:, :, band])
        parts.append(_window(q[:, :, low:high], (sink_k, sink_v), own, recent, rows, scores, room, want_lse))
        low = high
    # SDPA on CPU writes [B, T, H, D], and models want that layout: joining along T there keeps both copies sequential.
    outs, lses = zip(*parts, strict=True)
    out = (outs[0] if len(outs) == 1 else torch.cat(outs, 1)).transpose(1, 2)
    return out, torch.cat(lses, 2) if want_lse else None


def _listed(q: Tensor, segments: Sequence[Segment], blocks: BlockList, scores: Scores) -> tuple[Tensor, Tensor]:
    reason = _no_list(q.device, needs_grad(q, *(x for segment in segments for x in (segment.k, segment.v))))
    if reason is not None:
        raise UnsupportedModeError(f"kernel cpu {reason}. Kernel reference computes it.")
    own = partial(_partial, scores=scores)
    if q.shape[2] == 1:
        return _few_cpu.attend(q, segments, blocks, own)
    return _sparse_cpu.attend(q, *joined(segments), blocks, own)


def _tiled(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, bias: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention that also returns its logsumexp, tile by tile with temporaries of bounded size. Differentiable.

    q ``[B, H, T, D]``, k, v ``[B, n, S, D]``, bias (added to the capped scores, -inf hides a key) broadcastable to
    ``[B, n, T, S]``. ``causal``: the queries are the last T of the S tokens. Returns out ``[B, H, T, D]`` in the dtype
    of q and lse ``[B, H, T]`` in float32 or wider; a query that sees nothing gives 0 and -inf.
    """
    (batch, heads, q_len, _), kv_len = q.shape, k.shape[2]
    if not q.numel() or not kv_len:
        dtype = torch.promote_types(q.dtype, torch.float32)
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], float("-inf"), dtype=dtype)
    rows = max(1, TEMPORARY // (batch * heads * min(kv_len, TILE_KEYS)))
    blocks = []
    for low in range(0, q_len, rows):
        high = min(low + rows, q_len)
        seen = kv_len - q_len + high if causal else kv_len
        block = _fold(q[:, :, low:high], k.shape[1]).to(torch.promote_types(q.dtype, torch.float32))
        added = bias if bias is None or bias.shape[-2] == 1 else bias[..., low:high, :]
        parts = []
        for start in range(0, seen, TILE_KEYS):
            keys = slice(start, min(start + TILE_KEYS, seen))
            visible = _causal_tile(keys, seen, high - low, q.device) if causal else None
            visible = _per_head(visible, heads // k.shape[1])
            tile_bias = None if added is None else _per_head(added[..., keys], heads // k.shape[1])
            own = (block, k[:, :, keys], v[:, :, keys])
            parts.append(attention(*own, visible, scores.scale, tile_bias, scores.softcap))
        out, lse = merge(parts)
        blocks.append((_unfold(out, heads), _unfold(lse, heads)))
    outs, lses = zip(*blocks, strict=True)
    return torch.cat(outs, 2).to(q.dtype), torch.cat(lses, 2)


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """``[B, H, T, ...]`` to ``[B, n, G * T, ...]``: the query heads of a group become rows."""
    return x.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _unfold(x: Tensor, heads: int) -> Tensor:
    """``[B, n, G * T, ...]`` back to ``[B, H, T, ...]``."""
    return x.unflatten(2, (heads // x.shape[1], -1)).flatten(1, 2)


def _per_head(mask: Tensor | None, group: int) -> Tensor | None:
    """A mask with a row per query, ``[.., T, S]``, to one with a row per folded query, ``[.., G * T, S]``."""
    if mask is None or mask.shape[-2] == 1:
        return mask
    return mask.repeat(*[1] * (mask.dim() - 2), group, 1)


def _causal_tile(keys: slice, seen: int, rows: int, device: torch.device) -> Tensor:
    """Bool ``[rows, keys]``: which of these keys the last ``rows`` of ``seen`` tokens read."""
    last = torch.arange(seen - rows, seen, device=device)[:, None]
    return torch.arange(keys.start, keys.stop, device=device) <= last


def _folded(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """SDPA ``[B, H, T, D]`` with groups folded into rows; float mask ``[.., T or 1, S]``."""
    mask = _per_head(mask, q.shape[1] // k.shape[1])
    return _unfold(scaled_dot_product_attention(_fold(q, k.shape[1]), k, v, attn_mask=mask, scale=scale), q.shape[1])


def _square(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of as many queries as keys, ``[B, H, T, D]``."""
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.is_cuda and q.dtype not in (torch.float16, torch.bfloat16):
        # Only CUDA's flash kernel takes enable_gqa; any other dtype would build T x T scores.
        k = k.repeat_interleave(group, 1)
        v = v.repeat_interleave(group, 1)
        group = 1
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=group > 1)


def _gives_lse(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> bool:
    """Whether SDPA's CPU kernel may be asked for its logsumexp, through which no gradient flows."""
    strided = q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    return _flash_for_cpu is not None and q.device.type == "cpu" and strided and not needs_grad(q, k, v, bias)


def _partial(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, bias: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """`_tiled`, by SDPA's CPU kernel where that is possible: the past without a mask, then the diagonal, then merged.

    15 to 20 % faster than blocks of rows with a mask. ``causal``: queries before the first of the keys read nothing.
    """
    past = k.shape[2] - q.shape[2] if causal else k.shape[2]
    if past < 0 and q.numel():
        out, lse = _partial(q[:, :, -past:], k, v, scores, bias, causal)
        return pad(out, (0, 0, -past, 0)), pad(lse, (-past, 0), value=float("-inf"))
    plain = scores.softcap is None and _gives_lse(q, k, v, bias) and not (causal and bias is not None)
    if not q.numel() or not k.shape[2] or not plain:
        return _tiled(q, k, v, scores, bias, causal)
    heads = q.shape[1]
    parts = []
    if past:
        mask = _per_head(bias, heads // k.shape[1])
        out, lse = _flash(_fold(q, k.shape[1]), k[:, :, :past], v[:, :, :past], scores.scale, mask)
        parts.append((_unfold(out, heads), _unfold(lse, heads)))
    if causal:
        parts.append(_flash_for_cpu(q, k[:, :, past:], v[:, :, past:], 0.0, True, scale=scores.scale))
    return merge(parts)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of SDPA's CPU kernel, with a float mask ``[.., T or 1, S]`` of four dimensions."""
    out, lse = _flash_for_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    if mask is not None:  # the kernel reports 0, not -inf, for rows that see nothing
        lse = lse.masked_fill((mask == float("-inf")).all(-1), float("-inf"))
    return out, lse


def _block_rows(group: int) -> int:
    """Query rows per block of a streaming prefill, measured for windows of 256 and 1024 tokens.

    Fewer would copy more keys per query, more would read more keys outside the window.
    """
    return max(1, min(64, MASK_ROWS // group))


def _window(
    q: Tensor,
    sinks: tuple[Tensor, Tensor],
    band: tuple[Tensor, Tensor],
    recent: int,
    rows: int,
    scores: Scores,
    room: dict[tuple[int, int], tuple[Tensor, Tensor]],
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Blocks of ``rows`` queries that all see the sinks and ``recent`` keys: out ``[B, T, H, D]``, lse ``[B, H, T]``.

    T is a multiple of ``rows``.

    q ``[B, H, T, D]``; the band's k, v ``[B, n, recent - 1 + T, D]`` end at the last query. ``room`` keeps the gathered
    keys of one call for the next of the same size: their memory, and the sinks, which are the same in every block.
    """
    (batch, heads, q_len, dim), kv_heads, sink = q.shape, band[0].shape[1], sinks[0].shape[2]
    v_dim = band[1].shape[3]
    group = heads // kv_heads
    count = q_len // rows
    age = torch.arange(rows, device=q.device)[:, None] - torch.arange(1 - recent, rows, device=q.device)
    mask = torch.zeros(rows, sink + recent - 1 + rows, dtype=q.dtype, device=q.device)
    mask[:, sink:].masked_fill_((age < 0) | (age >= recent), float("-inf"))

    windows = [t.unfold(2, recent - 1 + rows, rows).permute(0, 2, 1, 4, 3) for t in band]  # [B, count, n, keys, D]
    spread = [t[:, None].expand(-1, count, -1, -1, -1) for t in sinks]
    size = (count, rows)
    if size in room and not needs_grad(q, *sinks, *band):
        keys, values = room[size]
        keys[:, :, :, sink:], values[:, :, :, sink:] = windows
    else:
        keys, values = room[size] = tuple(torch.cat(pair, 3) for pair in zip(spread, windows, strict=True))
    blocks = q.reshape(batch, kv_heads, group, count, rows, dim).permute(0, 3, 1, 2, 4, 5).flatten(0, 1).flatten(2, 3)
    keys = keys.flatten(0, 1)
    values = values.flatten(0, 1)
    out, lse = _masked(blocks, keys, values, mask.repeat(group, 1), scores, want_lse)
    out = out.unflatten(2, (group, rows)).unflatten(0, (batch, count)).permute(0, 1, 4, 2, 3, 5)
    if lse is not None:
        lse = lse.unflatten(2, (group, rows)).unflatten(0, (batch, count)).permute(0, 2, 3, 1, 4)
        lse = lse.reshape(batch, heads, q_len)
    return out.reshape(batch, q_len, heads, v_dim), lse


def _masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scores: Scores, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of q ``[B, n, T, D]`` over k, v ``[B, n, S, D]`` with a float mask ``[T, S]``."""
    if scores.softcap is None and not want_lse:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scores.scale), None
    if scores.softcap is None and _gives_lse(q, k, v):
        return _flash(q, k, v, scores.scale, mask[None, None])
    return attention(q, k, v, mask == 0, scores.scale, softcap=scores.softcap)


def _clean(segment: Segment) -> tuple[Tensor, Tensor]:
    """k, v ``[B, n, longest, D]``; where rows differ, copies with zeros past each length.

    Those slots are uninitialised memory: hidden by weight 0 they would still give 0 * NaN = NaN.
    """
    k, v = segment.contents()
    if isinstance(segment.length, int):
        return k, v
    empty = (torch.arange(segment.longest, device=k.device) >= segment.length[:, None])[:, None, :, None]
    return k.masked_fill(empty, 0), v.masked_fill(empty, 0)


def _score_bias(segment: Segment, q: Tensor) -> Tensor | None:
    """What is added to a segment's scores, ``[B or 1, n or 1, 1, longest]``: its bias, and -inf past each length."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    bias = segment.bias
    if bias is not None:
        bias = bias.to(dtype)[(None,) * (4 - bias.dim())].expand(-1, -1, -1, segment.longest)
    if isinstance(segment.length, int):
        return bias
    filled = (torch.arange(segment.longest, device=q.device) < segment.length[:, None])[:, None, None]
    if bias is None:
        # 0 and -inf are exact in any dtype, and fused kernels other than the CPU's want that of q.
        bias = torch.zeros((), dtype=q.dtype, device=q.device)
    return torch.where(filled, bias, float("-inf"))


def _takes_bias(q: Tensor, segment: Segment) -> bool:
    """Whether SDPA adds the float32 bias as it is; rounded to the half precision of q it would be off by percents."""
    return segment.bias is None or q.device.type == "cpu" or q.dtype in (torch.float32, torch.float64)


def with_lse(q: Tensor, segment: Segment, scores: Scores, causal: bool = False) -> tuple[Tensor, Tensor]:
    """(out, lse) of q ``[B, H, T, D]`` over one segment; causal needs a length that is the same in every row."""
    return _partial(q, *_clean(segment), scores, _score_bias(segment, q), causal)


def _ragged(q: Tensor, segment: Segment, scores: Scores) -> tuple[Tensor, Tensor]:
    """(out, lse) where each row's queries are the last T tokens of its own length: blocks of rows with a mask each."""
    (batch, heads, q_len, _), (k, v) = q.shape, _clean(segment)
    bias = _score_bias(segment, q)
    own = segment.length[:, None] - q_len + torch.arange(q_len, device=q.device)  # [B, T]: slot of each query
    slot = torch.arange(segment.longest, device=q.device)
    rows = max(1, MASK_ROWS // (batch * (heads // k.shape[1])))
    blocks = []
    for low in range(0, q_len, rows):
        hidden = (slot > own[:, low : low + rows, None])[:, None]
        blocks.append(_partial(q[:, :, low : low + rows], k, v, scores, bias.masked_fill(hidden, float("-inf"))))
    outs, lses = zip(*blocks, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)
