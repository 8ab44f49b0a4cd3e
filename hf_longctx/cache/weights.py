"""Weights as plain tensors, whatever class keeps them: torchao's and torch's own quantised ones pack theirs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

UNREADABLE = (RuntimeError, TypeError, AttributeError)  # NotImplementedError is a RuntimeError


def flat(tensor: Tensor) -> Tensor:
    """The numbers of a plain tensor in a row; a copy only where they lie otherwise."""
    return tensor.contiguous().view(-1)


def plain_parts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """(name, plain tensor) of what a weight consists of: itself, or what its class packs. [] where that is hidden."""
    tensor = tensor.detach()
    if tensor.is_quantized:
        return [(f"{name}.codes", tensor.int_repr()), (f"{name}.steps", _steps(tensor))]
    try:
        flat(tensor)[:1].view(torch.uint8)
    except UNREADABLE:
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
        parts = [(f"{name}.{part}", getattr(tensor, part)) for part in inner]
        return [plain for part in parts for plain in plain_parts(*part)]
    return [(name, tensor)]


def packed_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a module without parameters and buffers saves all the same: torch's dynamically quantised layers do."""
    if module._parameters or module._buffers or type(module)._save_to_state_dict is nn.Module._save_to_state_dict:
        return
    saved: dict = {}
    module._save_to_state_dict(saved, "", True)
    for name, value in saved.items():
        for number, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(tensor, Tensor):
                yield f"{name}.{number}", tensor


def _steps(tensor: Tensor) -> Tensor:
    if tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        return tensor.q_per_channel_scales()
    return torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)


def device_of(module: nn.Module, within: nn.Module) -> torch.device:
    """The device of a module's weights.

    A module may show none: torch's dynamically quantised layers pack theirs into objects that are no tensors. Then it
    is the device of the first weight of ``within``, the model around it.
    """
    shown = chain(module.parameters(), module.buffers(), within.parameters(), within.buffers())
    return next((tensor.device for tensor in shown), torch.device("cpu"))


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its input ids."""
    embeddings = model.get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)  # accelerate's, where weights are offloaded
    return torch.device(getattr(hook, "execution_device", None) or device_of(embeddings, model))
