"""What the kernels for NVIDIA GPUs refuse alike: `supports` of each adds its own reasons."""

from __future__ import annotations

import importlib
from functools import cache

import torch

HALF = (torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # Ampere: the first with bfloat16 matrix instructions and asynchronous copies


def refusal(device: torch.device, needs_grad: bool) -> str | None:
    """Why no kernel for NVIDIA GPUs computes the case: no such device here, or a gradient is asked for; else None."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if needs_grad:
        return "computes no gradients"
    if not torch.cuda.is_available():
        return "needs a CUDA device, and there is none"
    return None if torch.version.hip is None else "was written for NVIDIA devices"


def half_only(dtype: torch.dtype) -> str | None:
    """Why a kernel for half precision alone does not take this dtype."""
    return None if dtype in HALF else f"takes bfloat16 and float16, not {dtype}"


def no_triton(device: torch.device) -> str | None:
    """Why Triton cannot be used on this CUDA device."""
    if (reason := _not_imported()) is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= CAPABILITY else f"needs compute capability {CAPABILITY}, the device has {capability}"


@cache
def _not_imported() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None
