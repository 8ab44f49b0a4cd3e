"""What tells one model from another: its dimensions, dtype and active adapters, and a few numbers of every weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..config.model import model_facts
from ..errors import UnsupportedModeError
from .weights import flat, packed_weights, plain_parts

NUMBERS = 256  # of each weight, evenly spaced
WRAPPERS = (".base_layer", ".original_module")  # what PEFT puts around a weight's own name


def fingerprint(base: nn.Module) -> dict[str, Any]:
    """Plain data that is equal for models whose keys and values are equal, so far as 256 numbers of each weight tell.

    Reads no weight as a whole, and the device once per device. Adapters that are not active do not count, nor does
    what comes after the last layer's keys, such as the output head.

    Args:
        base: the base model that reads the text, without output head.

    Raises:
        UnsupportedModeError: weights lie elsewhere (meta device, offloaded), are spread over processes, or are of a
            class that does not show what it packs.
    """
    facts = model_facts(base.config)
    facts.pop("full_attention_layers")  # the roles of the layers say it
    dimensions = {**facts.pop("fingerprint"), **facts}
    rope = json.dumps(getattr(base.config, "rope_parameters", None), sort_keys=True)
    adapters, _ = _adapters(base)
    digest = weights_digest(base)
    return {**dimensions, "rope": rope, "dtype": str(base.dtype), "adapters": adapters, "weights": digest}


def weights_digest(module: nn.Module, complete: bool = True) -> str:
    """Digest of names, dtypes and shapes of all weights, and of ``NUMBERS`` evenly spaced values of each.

    Adapters that are not active do not count.

    Args:
        complete: refuse weights whose values this process cannot read; otherwise they count without their values.

    Raises:
        UnsupportedModeError: as ``fingerprint``, if ``complete``.
    """
    _, skipped = _adapters(module)
    digest = hashlib.sha256()
    parts = []
    for name, weight in _weights(module, tuple(skipped), complete):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        if not weight.is_meta:
            parts.append(_numbers(weight.detach()))
    for device in {part.device for part in parts}:
        here = [i for i, part in enumerate(parts) if part.device == device]
        fetched = torch.cat([parts[i] for i in here]).cpu().split([len(parts[i]) for i in here])
        for i, part in zip(here, fetched, strict=True):
            parts[i] = part
    if parts:
        digest.update(torch.cat(parts).numpy().tobytes())
    return digest.hexdigest()[:32]


def _adapters(base: nn.Module) -> tuple[list[str], list[str]]:
    """PEFT's active adapters as ``name (scaling)``, and the prefixes of the weights of those that are not active."""
    active = set()
    skipped = []
    for path, module in base.named_modules():
        if not getattr(type(module), "adapter_layer_names", ()):
            continue
        used = [] if module.disable_adapters else list(module.active_adapters)
        scaling = getattr(module, "scaling", {})
        for kind in module.adapter_layer_names:
            try:
                held = list(attrgetter(kind)(module).keys())
            except AttributeError:  # a kind of adapter that this layer does not have
                continue
            active |= {f"{name} (scaling {scaling.get(name, 1)})" for name in held if name in used}
            skipped += [f"{path}.{kind}.{name}" for name in held if name not in used]
    return sorted(active), skipped


def _weights(module: nn.Module, skipped: tuple[str, ...], complete: bool) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers (packed weights are buffers), under the names they have without adapters.

    A weight whose values cannot be read is refused, or, unless ``complete``, on the meta device.
    """
    readable = {}
    for path, part in module.named_modules():
        spread = getattr(part, "_hf_device_mesh", None) is not None
        if spread and complete:
            raise UnsupportedModeError(_unreadable(path, part, spread))
        saved = {**part._parameters, **part._buffers, **dict(packed_weights(part))}
        for name, tensor in saved.items():
            full = f"{path}.{name}" if path else name
            passing = tensor is None or not tensor.numel() or name in part._non_persistent_buffers_set
            if passing or _below(full, skipped):
                continue
            for wrapper in WRAPPERS:
                full = full.replace(wrapper, "")
            elsewhere = spread or tensor.is_meta or hasattr(tensor, "device_mesh")
            plain = () if elsewhere else plain_parts(full, tensor)
            if not plain and complete:
                raise UnsupportedModeError(_unreadable(full, tensor, spread))
            readable.update(plain or [(full, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))])
    yield from sorted(readable.items())


def _unreadable(name: str, weight: Any, spread: bool) -> str:
    """Why the values of a weight cannot be read here, and what to do."""
    advice = "Save and load caches with a model whose weights are all in the memory of this process."
    if spread or hasattr(weight, "device_mesh"):
        reason = "spread over processes (tensor parallel)"
    elif weight.is_meta:
        reason = "on the meta device (offloaded, or without weights)"
    else:
        reason = f"of class {type(weight).__name__}, which does not show its numbers"
        advice = (
            "Save and load caches with a model whose weights are plain tensors, or of a class with "
            "__tensor_flatten__ (as torchao's)."
        )
    return f"a file names the model it was made with, which cannot be told: {name} is {reason}. {advice}"


def _below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _numbers(tensor: Tensor) -> Tensor:
    """Bytes of ``NUMBERS`` evenly spaced numbers, the first and the last among them."""
    numbers = flat(tensor)
    count = min(NUMBERS, len(numbers))
    places = torch.arange(count) * (len(numbers) - 1) // max(count - 1, 1)
    return numbers.view(torch.uint8).view(len(numbers), -1)[places.to(numbers.device)].flatten()
