"""NaN and inf in keys, values and logits: looked for in a cache's file, or in every forward with HF_LONGCTX_CHECK=1."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from ..errors import CacheError, ConfigError

SWITCH = "HF_LONGCTX_CHECK"


@cache
def every_forward() -> bool:
    """Whether each layer checks what it is given; the environment is read here, once.

    Raises:
        ConfigError: ``HF_LONGCTX_CHECK`` is neither 0 nor 1.
    """
    switch = os.environ.get(SWITCH, "0")
    if switch not in ("0", "1"):
        raise ConfigError(f"{SWITCH} is 0 (off, the default) or 1 (on), given {switch!r}.")
    return switch == "1"


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or inf; integers are. Reads the device once, and makes no copy but of 8-bit floats."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach() if tensor.element_size() > 1 else tensor.detach().float())
    return bool(torch.isfinite(torch.stack([low, high])).all())  # NaN wins in both


def check_forward(layer_idx: int, k: Tensor, v: Tensor) -> None:
    """Raise CacheError where a layer is given keys or values with NaN or inf."""
    for name, tensor in (("keys", k), ("values", v)):
        if not is_finite(tensor):
            raise CacheError(
                f"layer {layer_idx} was given {name} with NaN or inf ({tensor.dtype}). Weights or activations overflow "
                f"before it: load the model in bfloat16 or float32. {SWITCH}=0 turns this check off; cache.crop(0) "
                "takes this forward back."
            )


def check_logits(logits: Tensor) -> None:
    """Raise ConfigError where logits are NaN, which name no token."""
    if logits.isnan().any():
        raise ConfigError(
            "the logits of this model are NaN: its weights are, or it overflows. Load the model in bfloat16 or "
            f"float32; {SWITCH}=1 finds the first layer."
        )
