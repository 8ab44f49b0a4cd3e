"""What one attention layer was told at patch time: the role of each of its KV heads, their stores and patterns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

from ..layout.heads import RoleHeads
from ..prefill.base import PatternSpec
from ..stores.base import StoreSpec

LETTERS = {"retrieval": "R", "streaming": "S"}
FEWEST = 128  # real tokens a forward must bring of a row for its pattern to run; verification steps bring fewer


@dataclass(frozen=True)
class PrefillPlan:
    """How the retrieval heads of one layer read a prompt.

    Attributes:
        patterns: one spec per query head of the layer's retrieval KV heads, in their order.
        min_tokens: a row that has seen fewer real tokens is read densely.
        share_groups: one list per KV head, the union of its query heads' lists.
    """

    patterns: tuple[PatternSpec, ...]
    min_tokens: int
    share_groups: bool

    def runs(self, brought: int, seen: int) -> bool:
        """Whether the patterns run for a row that shows ``brought`` new real tokens and has seen ``seen`` so far."""
        return brought >= FEWEST and seen >= self.min_tokens


@dataclass(frozen=True)
class LayerPlan:
    """Frozen, and all that patching leaves on an attention module.

    Attributes:
        layer_idx: index of the layer in the model and in the cache.
        roles: one letter (R or S) per KV head, of this process under tensor parallel.
        stores: role -> spec of its store.
        kernel: the config's ``kernel`` word.
        sliding: the layer has the model's own sliding window, which replaces both roles' stores.
        prefill: the patterns of the retrieval heads; None where all of them read densely.
    """

    layer_idx: int
    roles: str
    stores: dict[str, StoreSpec]
    kernel: str = "auto"
    sliding: bool = False
    prefill: PrefillPlan | None = None

    @cached_property
    def heads(self) -> tuple[RoleHeads, ...]:
        """The layer's heads by role, roles without heads left out."""
        found = []
        for role, letter in LETTERS.items():
            indices = tuple(i for i, given in enumerate(self.roles) if given == letter)
            if indices:
                found.append(RoleHeads(role, indices, len(self.roles)))
        return tuple(found)


def differing(plans: Sequence[LayerPlan], others: Sequence[LayerPlan]) -> list[str]:
    """Names of the fields in which plans of the same layers differ."""
    names = [field.name for field in fields(LayerPlan)]
    pairs = list(zip(plans, others, strict=False))
    return [name for name in names if any(getattr(one, name) != getattr(other, name) for one, other in pairs)]
