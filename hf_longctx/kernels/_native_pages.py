"""`HeadPages` as the library takes them, which reads where it is told to, and what is asked of them before."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout.head_pages import KIND, HeadPages
from ..layout.reads import All, Causal

PAGES = frozenset({KIND})
WHY = "pages, heads and lengths beyond the rows that there are"


def reason(reads: type, one_query: bool, device: torch.device) -> str | None:
    """Why head pages are not read as they are; None where they are."""
    if not one_query or reads not in (All, Causal):
        return "reads head pages for one query of each sequence alone"
    return None if device.type == "cpu" else "reads head pages on the CPU alone: elsewhere they come in blocks"


def misfit(pages: HeadPages, q: Tensor) -> str | None:
    """What of it does not belong together or to these queries, in words; None: all of it does.

    Not the numbers of pages, heads and lengths, which the library looks at in each call.
    """
    batch, width = pages.pages.shape
    shapes = {"pages": (q.shape[0], width), "heads": (len(pages.heads),), "lengths": (q.shape[0],)}
    for name, shape in shapes.items():
        x = getattr(pages, name)
        if not (x.shape == shape and x.dtype == torch.int64 and x.device.type == "cpu" and x.is_contiguous()):
            return f"{name} {x.dtype} {list(x.shape)} on {x.device} for {q.shape[0]} sequences"
    if pages.page < 1 or not len(pages.heads) or q.shape[1] % len(pages.heads):
        return f"pages of {pages.page} tokens and {len(pages.heads)} KV heads for {q.shape[1]} query heads"
    return None


def numbers(pages: HeadPages) -> tuple[int, ...]:
    """``HeadPages`` of vectors.h. The tensors must live as long as the call."""
    k, v = pages.k, pages.v
    tokens = (k.stride(0) * k.element_size(), v.stride(0) * v.element_size())
    where = (pages.pages.data_ptr(), pages.heads.data_ptr(), pages.lengths.data_ptr())
    return k.data_ptr(), v.data_ptr(), *tokens, *where, pages.pages.shape[1], pages.page, min(len(k), len(v))
