"""Products of a query and of keys, by which selections score tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.reference import products
from ..layout.gather import key_pieces
from ..layout.segments import Segment
from ..layout.streamed import Streamed


def products_between(q: Tensor, cached: Sequence[Segment | Streamed], low: int, high: int) -> Tensor:
    """q ``[B, H, 1, D]`` times the keys of its KV heads at the positions ``low .. high``, in pieces: ``[B, H, W]``."""
    return torch.cat([products(q, k) for _, k in key_pieces(cached, low, high)], 2)
