"""What one attention layer was told at patch time: the role of each of its KV heads, and the stores of the roles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .kernels.layout import RoleHeads
from .stores.base import StoreSpec

LETTERS = {"retrieval": "R", "streaming": "S"}


@dataclass(frozen=True)
class LayerPlan:
    """Frozen, and all that patching leaves on an attention module.

    Attributes:
        layer_idx: index of the layer in the model and in the cache.
        roles: one letter (R or S) per KV head, of this process under tensor parallel.
        stores: role -> spec of its store.
        kernel: the config's ``kernel`` word.
        sliding: the layer has the model's own sliding window, which replaces both roles' stores.
    """

    layer_idx: int
    roles: str
    stores: dict[str, StoreSpec]
    kernel: str = "auto"
    sliding: bool = False

    @cached_property
    def heads(self) -> tuple[RoleHeads, ...]:
        """The layer's heads by role, roles without heads left out."""
        found = []
        for role, letter in LETTERS.items():
            indices = tuple(i for i, given in enumerate(self.roles) if given == letter)
            if indices:
                found.append(RoleHeads(role, indices, len(self.roles)))
        return tuple(found)
