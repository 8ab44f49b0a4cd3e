"""Dense prefill and streaming windows by flash-attn 2, 3 or 4, whichever is installed; never required.

FlashAttention-2 (arXiv:2307.08691) is the module `flash_attn`, -3 (arXiv:2407.08608) `flash_attn_interface`, -4
`flash_attn.cute`. All three have `flash_attn_func` on q ``[B, T, H, D]`` and k, v ``[B, S, n, D]``, with causality and
windows counted from the last key, and can hand out the logsumexp. They are imported at the first question, never by
importing this file. Decoding, lengths by sequence and several segments are `cpu.py`'s; block lists are not read.

Shapes here: ``B`` batch, ``H`` query heads, ``n`` KV heads, ``T`` query tokens, ``S`` key tokens, ``D`` head_dim.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..errors import UnsupportedModeError
from ..layout.reads import Causal, Reads, Window
from ..layout.scores import Scores
from ..layout.segments import Segment
from . import _nvidia, cpu
from ._arguments import PLAIN, check
from .base import Case, case_of
from .reference import merge

NAME = "flash"
# Below cpu's, whose SDPA is flash attention on CUDA as well: until both have been timed on a device, by name alone.
PREFERENCE = 2
READS = frozenset({Causal, Window})


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


def supports(case: Case) -> str | None:
    """None when this kernel computes the case, otherwise why it does not."""
    if case.kinds:
        return PLAIN
    if case.softcap or case.first_bias:
        return "computes neither a softcap nor a bias of the first token"
    # No gradient, because none flows through the logsumexp.
    missing = _nvidia.refusal(case.device, case.needs_grad) or _nvidia.half_only(case.dtype)
    return missing or _not_found(case.device, case.head_dim)


def attend(
    q: Tensor, segments: Sequence[Segment], reads: Reads, scores: Scores, want_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Attention as `base` says: out ``[B, H, T, D_v]``, lse ``[B, H, T]``."""
    if (reason := supports(case_of(q, segments, reads, scores))) is not None:
        raise UnsupportedModeError(f"kernel flash {reason}. Use kernel: auto or cpu.")
    check(NAME, q, segments, reads, scores)
    own = segments[-1]
    plain = len(segments) == 1 and own.bias is None and isinstance(own.length, int)
    if isinstance(reads, Window) and q.numel():
        return _streaming(q, segments, reads, scores.scale)
    if isinstance(reads, Causal) and plain and q.numel():
        return _call(q, *own.contents(), scores.scale, causal=True)
    return cpu.attend(q, segments, reads, scores, want_lse)


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


def _call(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, recent: int | None = None) -> tuple:
    """(out ``[B, H, T, D]``, lse ``[B, H, T]``), the queries being the last T of the S tokens where ``causal``.

    ``recent``: only the keys i - j < recent.
    """
    call = _function(_version(q.device, q.shape[3]).module)
    names = inspect.signature(call).parameters
    # Some versions return the logsumexp when asked, by one of two words, others always.
    asked = {name: True for name in ("return_attn_probs", "return_lse") if name in names}
    if recent is not None:
        asked["window_size"] = (recent - 1, 0)
    given = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = call(*given, softmax_scale=scale, causal=causal, **asked)[:2]
    return out.transpose(1, 2), lse


def _streaming(q: Tensor, segments: Sequence[Segment], reads: Window, scale: float) -> tuple[Tensor, Tensor]:
    """A window and the sinks, joined by logsumexp.

    The queries before position first + recent see all there is, a dense prefill: so no query is left that reads nothing
    of a part, for which the versions give different logsumexps.
    """
    (sink_k, sink_v), (k, v) = (segment.contents() for segment in segments)
    q_len = q.shape[2]
    first = reads.first
    start = first + k.shape[2] - q_len
    head = min(max(first + reads.recent - start, 0), q_len)
    found = []
    if head:
        seen = start + head - first
        keys, values = (torch.cat([s, t[:, :, :seen]], 2) for s, t in ((sink_k, k), (sink_v, v)))
        found.append(_call(q[:, :, :head], keys, values, scale, causal=True))
    if head < q_len:
        later = q[:, :, head:]
        parts = [_call(later, k, v, scale, causal=True, recent=reads.recent)]
        if sink_k.shape[2]:
            parts.append(_call(later, sink_k, sink_v, scale, causal=False))
        found.append(merge(parts))
    outs, lses = zip(*found, strict=True)
    return (outs[0], lses[0]) if len(found) == 1 else (torch.cat(outs, 2), torch.cat(lses, 2))
