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

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..errors import UnsupportedModeError
from ..layout.blocks import BlockList
from ..layout.dtypes import needs_grad
from ..layout.segments import Segment
from . import _sparse_cpu
from .reference import attention, merge

NAME = "cpu"
PREFERENCE = 10

MASK_ROWS = 512  # rows of the largest mask, group fold included
TILE_KEYS = 4096  # keys per step of `attend`
TEMPORARY = 1 << 20  # numbers per temporary: scores of `attend`, gathered keys of `streaming_prefill`

# SDPA's own CPU kernel, called by its aten name because only there it also returns the logsumexp.
_flash_for_cpu = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def supports(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> str | None:
    """None when this kernel computes the case, otherwise why it does not."""
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"scaled_dot_product_attention does not take {dtype}"
    return None


def supports_sparse_prefill(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> str | None:
    """None when `sparse_prefill` computes the case, otherwise why it does not."""
    if needs_grad:
        return "its sparse_prefill has no gradient: call the model under torch.no_grad() where none is wanted"
    if device.type != "cpu":
        return "its sparse_prefill is for the CPU alone"
    return supports(device, dtype, head_dim, needs_grad)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention that also returns its logsumexp, tile by tile with temporaries of bounded size. Differentiable.

    q ``[B, H, T, D]``, k, v ``[B, n, S, D]``, bias (added to the scaled scores, -inf hides a key) broadcastable to
    ``[B, n, T, S]``. ``causal``: the queries are the last T of the S tokens. Returns out ``[B, H, T, D]`` in the dtype
    of q and lse ``[B, H, T]`` in float32 or wider; a query that sees nothing gives 0 and -inf.
    """
    (batch, heads, q_len, _), kv_len = q.shape, k.shape[2]
    if not q.numel() or not kv_len:
        dtype = torch.promote_types(q.dtype, torch.float32)
        return torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"), dtype=dtype)
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
            parts.append(attention(block, k[:, :, keys], v[:, :, keys], visible, scale, tile_bias))
        out, lse = merge(parts)
        blocks.append((_unfold(out, heads), _unfold(lse, heads)))
    outs, lses = zip(*blocks, strict=True)
    return torch.cat(outs, 2).to(q.dtype), torch.cat(lses, 2)


def dense_prefill(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention ``[B, H, T, D]``, the queries being the last T of the S >= T tokens of k, v ``[B, n, S, D]``."""
    q_len, kv_len = q.shape[2], k.shape[2]
    if not q.numel():
        return torch.zeros_like(q)
    if q_len == kv_len:
        return _square(q, k, v, scale)
    if q_len == 1:
        return _folded(q, k, v, scale)
    if _gives_lse(q, k, v):
        return _partial(q, k, v, scale, causal=True)[0]
    rows = max(1, MASK_ROWS // (q.shape[1] // k.shape[1]))
    blocks = []
    for low in range(0, q_len, rows):
        high = min(low + rows, q_len)
        seen = kv_len - q_len + high
        visible = _causal_tile(slice(0, seen), seen, high - low, q.device)
        mask = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
        blocks.append(_folded(q[:, :, low:high], k[:, :, :seen], v[:, :, :seen], scale, mask))
    return torch.cat(blocks, 2)


def streaming_prefill(
    q: Tensor, sink_k: Tensor, sink_v: Tensor, k: Tensor, v: Tensor, *, recent: int, first: int, scale: float
) -> Tensor:
    """StreamingLLM attention (arXiv:2309.17453) in O(T * (s + recent)) time and bounded temporary memory.

    sink_k, sink_v ``[B, n, s, D]`` are the row positions 0..s-1, k, v ``[B, n, N, D]`` the positions first..first+N-1,
    first >= s; the queries, ``[B, H, T, D]``, are the last T row positions up to first+N-1. Query i reads the sinks r
    <= i and, of the band, the positions j <= i with i - j < recent (recent >= 1). The band holds every such position;
    so, where N < T and the first queries are sinks themselves, first == s.

    The first queries see all there is, a dense causal prefill. Every later one sees all sinks and exactly ``recent``
    keys, so blocks of queries differ only in where their band starts: they go to the batch dimension and share one
    small mask.
    """
    batch, heads, q_len, dim = q.shape
    if not q.numel():
        return torch.zeros_like(q)
    start = first + k.shape[2] - q_len  # row position of the first query
    head = min(max(first + recent - start, 0), q_len)
    blocks = []
    if head:
        seen = start + head - first
        keys, values = k[:, :, :seen], v[:, :, :seen]
        if sink_k.shape[2]:
            keys, values = torch.cat([sink_k, keys], 2), torch.cat([sink_v, values], 2)
        blocks.append(dense_prefill(q[:, :, :head], keys, values, scale).transpose(1, 2))
    rows = _block_rows(heads // k.shape[1])
    width = batch * k.shape[1] * (sink_k.shape[2] + recent + rows) * dim
    step = rows * min(64, max(1, TEMPORARY // width))
    low, room = head, {}
    while low < q_len:
        left = q_len - low
        high = low + (min(step, left // rows * rows) or left)
        rows = min(rows, left)
        band = slice(start + low - first - recent + 1, start + high - first)
        own = (k[:, :, band], v[:, :, band])
        blocks.append(_window(q[:, :, low:high], (sink_k, sink_v), own, recent, rows, scale, room))
        low = high
    # SDPA on CPU writes [B, T, H, D], and models want that layout: joining along T there keeps both copies sequential.
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)).transpose(1, 2)


def decode(q: Tensor, segments: list[Segment], scale: float) -> Tensor:
    """Attention ``[B, H, 1, D]`` of one token over every key of every segment, but for slots past a row's length."""
    if len(segments) > 1:
        return merge([with_lse(q, segment, scale) for segment in segments])[0]
    segment = segments[0]
    if not q.numel() or not segment.longest or not _takes_bias(q, segment):
        return with_lse(q, segment, scale)[0]
    return _folded(q, *_clean(segment), scale, _score_bias(segment, q))


def dense_prefill_segments(q: Tensor, segments: list[Segment], scale: float) -> Tensor:
    """Causal attention ``[B, H, T, D]`` whose queries are the last T tokens of the last segment; all see the others.

    Where a length differs by row, the queries of that row are the last T tokens of its own length.
    """
    *past, own = segments
    if q.shape[2] == 1:
        return decode(q, segments, scale)
    if not past and isinstance(own.length, int) and own.bias is None:
        return dense_prefill(q, *own.kept(), scale)
    last = _ragged(q, own, scale) if isinstance(own.length, Tensor) else with_lse(q, own, scale, causal=True)
    return merge([*(with_lse(q, segment, scale) for segment in past), last])[0]


def sparse_prefill(q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, scale: float) -> Tensor:
    """Attention ``[B, H, T, D]`` that reads what ``blocks`` lists, the queries being the last T of S tokens.

    Raises:
        UnsupportedModeError: a gradient is asked for.
    """
    reason = supports_sparse_prefill(q.device, q.dtype, q.shape[3], needs_grad(q, k, v))
    if reason is not None:
        raise UnsupportedModeError(f"kernel cpu: {reason}. Kernel reference computes it.")
    return _sparse_cpu.sparse_prefill(q, k, v, blocks, scale, _partial)


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
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=group > 1)


def _gives_lse(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> bool:
    """Whether SDPA's CPU kernel may be asked for its logsumexp, through which no gradient flows."""
    strided = q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    return _flash_for_cpu is not None and q.device.type == "cpu" and strided and not needs_grad(q, k, v, bias)


def _partial(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """`attend`, by SDPA's CPU kernel where that is possible: the past without a mask, then the diagonal, then merged.

    15 to 20 % faster than blocks of rows with a mask.
    """
    heads, past = q.shape[1], k.shape[2] - q.shape[2] if causal else k.shape[2]
    if not q.numel() or not k.shape[2] or not _gives_lse(q, k, v, bias) or (causal and bias is not None):
        return attend(q, k, v, scale, bias, causal)
    parts = []
    if past:
        folded, bias = _fold(q, k.shape[1]), _per_head(bias, heads // k.shape[1])
        out, lse = _flash_for_cpu(folded, k[:, :, :past], v[:, :, :past], 0.0, False, attn_mask=bias, scale=scale)
        if bias is not None:  # the kernel reports 0, not -inf, for rows that see nothing
            lse = lse.masked_fill((bias == float("-inf")).all(-1), float("-inf"))
        parts.append((_unfold(out, heads), _unfold(lse, heads)))
    if causal:
        parts.append(_flash_for_cpu(q, k[:, :, past:], v[:, :, past:], 0.0, True, scale=scale))
    return merge(parts)


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
    scale: float,
    room: dict[tuple[int, int], tuple[Tensor, Tensor]],
) -> Tensor:
    """Blocks of ``rows`` queries that all see the sinks and ``recent`` keys: ``[B, T, H, D]``, T a multiple of rows.

    q ``[B, H, T, D]``; the band's k, v ``[B, n, recent - 1 + T, D]`` end at the last query. ``room`` keeps the gathered
    keys of one call for the next of the same size: their memory, and the sinks, which are the same in every block.
    """
    (batch, heads, q_len, dim), kv_heads, sink = q.shape, band[0].shape[1], sinks[0].shape[2]
    group, count = heads // kv_heads, q_len // rows
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
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    out = scaled_dot_product_attention(blocks, keys, values, attn_mask=mask.repeat(group, 1), scale=scale)
    out = out.unflatten(2, (group, rows)).unflatten(0, (batch, count)).permute(0, 1, 4, 2, 3, 5)
    return out.reshape(batch, q_len, heads, dim)


def _clean(segment: Segment) -> tuple[Tensor, Tensor]:
    """k, v ``[B, n, longest, D]``; where rows differ, copies with zeros past each length.

    Those slots are uninitialised memory: hidden by weight 0 they would still give 0 * NaN = NaN.
    """
    k, v = segment.kept()
    if isinstance(segment.length, int):
        return k, v
    empty = (torch.arange(segment.longest, device=k.device) >= segment.length[:, None])[:, None, :, None]
    return k.masked_fill(empty, 0), v.masked_fill(empty, 0)


def _score_bias(segment: Segment, q: Tensor) -> Tensor | None:
    """What is added to a segment's scores, ``[B or 1, n or 1, 1, longest]``: its bias, and -inf past each length."""
    dtype, bias = torch.promote_types(q.dtype, torch.float32), segment.bias
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


def with_lse(q: Tensor, segment: Segment, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """(out, lse) of q ``[B, H, T, D]`` over one segment; causal needs a length that is the same in every row."""
    return _partial(q, *_clean(segment), scale, _score_bias(segment, q), causal)


def _ragged(q: Tensor, segment: Segment, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) where each row's queries are the last T tokens of its own length: blocks of rows with a mask each."""
    (batch, heads, q_len, _), (k, v) = q.shape, _clean(segment)
    bias = _score_bias(segment, q)
    own = segment.length[:, None] - q_len + torch.arange(q_len, device=q.device)  # [B, T]: slot of each query
    slot = torch.arange(segment.longest, device=q.device)
    rows = max(1, MASK_ROWS // (batch * (heads // k.shape[1])))
    blocks = []
    for low in range(0, q_len, rows):
        hidden = (slot > own[:, low : low + rows, None])[:, None]
        blocks.append(_partial(q[:, :, low : low + rows], k, v, scale, bias.masked_fill(hidden, float("-inf"))))
    outs, lses = zip(*blocks, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)
