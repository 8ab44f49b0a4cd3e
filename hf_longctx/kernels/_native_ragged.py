"""`Ragged` as the library takes it, which reads where it is told to, and what is asked of one before."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout.dtypes import needs_grad
from ..layout.head_pages import HeadPages
from ..layout.ragged import Ragged

OUTSIDE = -2  # what the library returns where a part lies outside of the tokens
WHY = "starts and lengths beyond the tokens that there are"
NONE = (0,) * 8  # in place of `numbers` where there is none


def numbers(ragged: Ragged) -> tuple[int, ...]:
    """``Ragged`` of vectors.h. The tensors must live as long as the call."""
    k, v, bias = ragged.k, ragged.v, ragged.score_bias
    tokens = (k.stride(0) * k.element_size(), v.stride(0) * v.element_size())
    where = (ragged.starts.data_ptr(), ragged.lengths.data_ptr())
    return k.data_ptr(), v.data_ptr(), *tokens, *where, 0 if bias is None else bias.data_ptr(), len(k)


def facts(ragged: Ragged) -> tuple:
    """What tells one from another whose memory lies elsewhere, or is read otherwise."""
    tensors = (ragged.k, ragged.v, ragged.starts, ragged.lengths, ragged.score_bias)
    return tuple((x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors if x is not None)


def fits(flat: Ragged | HeadPages, q: Tensor) -> bool:
    """Whether the library takes these keys and values, ``[N, D]``, for such queries."""
    kv = (flat.k, flat.v)
    return (
        not needs_grad(*kv)
        and all(x.dtype == q.dtype and x.device == q.device and x.shape[1] == q.shape[3] for x in kv)
        and (flat.k.stride(1) == flat.v.stride(1) == 1)
    )


def misfit(ragged: Ragged, batch: int, kv_heads: int) -> str | None:
    """What of it does not belong together or to so many sequences and KV heads, in words; None: all of it does.

    Not the numbers of starts and lengths, which the library looks at in each call.
    """
    tokens = len(ragged.k)
    if len(ragged.v) != tokens:
        return f"{tokens} keys and {len(ragged.v)} values"
    for name in ("starts", "lengths"):
        x = getattr(ragged, name)
        right = x.shape == (batch, kv_heads) and x.dtype == torch.int64 and x.device.type == "cpu"
        if not (right and x.is_contiguous()):
            return f"{name} {x.dtype} {list(x.shape)} on {x.device} for {batch} sequences of {kv_heads} KV heads"
    bias = ragged.score_bias
    if bias is not None and not (
        bias.dtype == torch.float32 and bias.shape == (tokens,) and bias.is_contiguous() and bias.device.type == "cpu"
    ):
        return f"a bias {bias.dtype} {list(bias.shape)} on {bias.device} for {tokens} tokens"
    return None
