"""What a long run saves on its way: a file in the work folder that other settings are kept from."""

from __future__ import annotations

import hashlib

from torch import nn

from ..cache.weights import plain_parts
from ..model.modules import unwrap


def model_hash(model: nn.Module) -> str:
    """Of the names and shapes of all weights and the first values of each: reading all of them would take minutes."""
    told = hashlib.sha256()
    for name, weight in unwrap(model).named_parameters():
        told.update(f"{name}{tuple(weight.shape)}".encode())
        for _, part in () if weight.is_meta else plain_parts(name, weight):
            told.update(part.flatten()[:8].float().cpu().numpy().tobytes())
    return told.hexdigest()[:16]
