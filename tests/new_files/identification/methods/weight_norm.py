"""``weight_norm``: the size of a head's key projection."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import Method


@dataclass(frozen=True)
class WeightNorm(Method):
    """The norm of the weights that make a head's keys.

    Attributes:
        power: of the norm.
    """

    paper = "arXiv:0000.00000"
    reads_documents = needs_tokenizer = False

    power: float = field(default=1.0, metadata={"above": 0.0, "max": 8.0})

    @torch.no_grad()
    def scores(self, probe) -> Tensor:
        weights = [layer.self_attn.k_proj.weight for layer in probe.model.base_model.layers]
        heads = [weight.unflatten(0, (probe.kv_heads, -1)).flatten(1) for weight in weights]
        return torch.stack([one.norm(dim=1) for one in heads]).double().cpu() ** self.power
