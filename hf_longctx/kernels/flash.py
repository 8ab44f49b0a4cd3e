"""Dense prefill and streaming windows by flash-attn 2, 3 or 4, whichever is installed; never required.

FlashAttention-2 (arXiv:2307.08691) is the module `flash_attn`, -3 (arXiv:2407.08608) `flash_attn_interface`, -4
`flash_attn.cute`. All three have `flash_attn_func` on q ``[B, T, H, D]`` and k, v ``[B, S, n, D]``, with causality and
windows counted from the last key, and can hand out the logsumexp. They are imported at the first question, never by
importing this file. Decoding and segments that are not plain are `cpu.py`'s, and there is no `sparse_prefill`.

Shapes here: ``B`` batch, ``H`` query heads, ``n`` KV heads, ``T`` query tokens, ``S`` key tokens, ``D`` head_dim.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..errors import UnsupportedModeError
from ..layout.dtypes import needs_grad
from ..layout.segments import Segment
from . import _nvidia
from .cpu import decode
from .cpu import dense_prefill_segments as any_segments
from .reference import merge

__all__ = ["decode", "dense_prefill", "dense_prefill_segments", "streaming_prefill", "supports"]

NAME = "flash"
# Below cpu's, whose SDPA is flash attention on CUDA as well: until both have been timed on a device, by name alone.
PREFERENCE = 2


@dataclass(frozen=True)
class _Version:
    """A version of the package: its module, the compute capabilities (major) it is for, and its largest head_dim."""

    module: str
    capabilities: range
    head_dim: int


VERSIONS = (  # preferred ones first
    _Version("flash_attn_interface", range(9, 10), 256),
    _Version("flash_attn.cute", range(9, 11), 128),
    _Version("flash_attn", range(8, 13), 256),
)


def supports(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> str | None:
    """None when this kernel computes the case, otherwise why it does not."""
    # No gradient, because none flows through the logsumexp.
    return _nvidia.refusal(device, needs_grad) or _nvidia.half_only(dtype) or _not_found(device, head_dim)


def _version(device: torch.device, head_dim: int) -> _Version | None:
    """The installed version for this device and head_dim, None where there is none."""
    major = torch.cuda.get_device_capability(device)[0]
    fits = (one for one in VERSIONS if major in one.capabilities and head_dim <= one.head_dim and head_dim % 8 == 0)
    return next((one for one in fits if _function(one.module) is not None), None)


def _not_found(device: torch.device, head_dim: int) -> str | None:
    """Why there is no version for this device and head_dim; None where there is."""
    if _version(device, head_dim) is not None:
        return None
    found = [one.module for one in VERSIONS if _function(one.module) is not None]
    if not found:
        return "none of the modules " + ", ".join(one.module for one in VERSIONS) + " can be imported"
    capability = torch.cuda.get_device_capability(device)
    return f"found {', '.join(found)}, not for compute capability {capability} with head_dim {head_dim}"


@cache
def _function(module: str) -> Callable | None:
    """`flash_attn_func` of a module, None where it cannot be imported."""
    try:
        return getattr(importlib.import_module(module), "flash_attn_func", None)
    except ImportError:
        return None


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, recent: int | None = None) -> tuple:
    """(out ``[B, H, T, D]``, lse ``[B, H, T]``), the queries being the last T of the S tokens where ``causal``.

    ``recent``: only the keys i - j < recent.

    Raises:
        UnsupportedModeError: the case is not one that `supports` names.
    """
    reason = supports(q.device, q.dtype, q.shape[3], needs_grad(q, k, v))
    if reason is not None:
        raise UnsupportedModeError(f"kernel flash {reason}. Use kernel: auto or cpu.")
    call = _function(_version(q.device, q.shape[3]).module)
    names = inspect.signature(call).parameters
    # Some versions return the logsumexp when asked, by one of two words, others always.
    asked = {name: True for name in ("return_attn_probs", "return_lse") if name in names}
    if recent is not None:
        asked["window_size"] = (recent - 1, 0)
    given = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = call(*given, softmax_scale=scale, causal=causal, **asked)[:2]
    return out.transpose(1, 2), lse


def dense_prefill(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention ``[B, H, T, D]``, the queries being the last T of the S >= T tokens of k, v ``[B, n, S, D]``."""
    return _attend(q, k, v, scale, causal=True)[0] if q.numel() else torch.zeros_like(q)


def dense_prefill_segments(q: Tensor, segments: list[Segment], scale: float) -> Tensor:
    """Causal attention ``[B, H, T, D]`` whose queries are the last T tokens of the last segment; all see the others."""
    own = segments[0]
    if len(segments) > 1 or q.shape[2] == 1 or own.bias is not None or not isinstance(own.length, int):
        return any_segments(q, segments, scale)
    return dense_prefill(q, *own.kept(), scale)


def streaming_prefill(
    q: Tensor, sink_k: Tensor, sink_v: Tensor, k: Tensor, v: Tensor, *, recent: int, first: int, scale: float
) -> Tensor:
    """StreamingLLM attention (arXiv:2309.17453) as `reference.streaming_prefill` defines it, ``[B, H, T, D]``.

    A window and the sinks, joined by logsumexp. The queries before position first + recent see all there is, a dense
    prefill: so no query is left that reads nothing of a part, for which the versions give different logsumexps.
    """
    if not q.numel():
        return torch.zeros_like(q)
    q_len, sink = q.shape[2], sink_k.shape[2]
    start = first + k.shape[2] - q_len
    head = min(max(first + recent - start, 0), q_len)
    outs = []
    if head:
        seen = start + head - first
        keys, values = (torch.cat([s, t[:, :, :seen]], 2) for s, t in ((sink_k, k), (sink_v, v)))
        outs.append(dense_prefill(q[:, :, :head], keys, values, scale))
    if head < q_len:
        later = q[:, :, head:]
        parts = [_attend(later, k, v, scale, causal=True, recent=recent)]
        if sink:
            parts.append(_attend(later, sink_k, sink_v, scale, causal=False))
        outs.append(merge(parts)[0])
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)
