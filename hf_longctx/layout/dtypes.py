"""What autocast and gradients ask of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient must flow through one of them."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def autocast_on(x: Tensor) -> bool:
    """Whether torch.autocast is on where ``x`` is."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype torch.autocast would give them, as SDPA does by itself; unchanged without autocast.

    Under autocast a model's rotated q and k are float32 while its v is not.
    """
    if not autocast_on(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
