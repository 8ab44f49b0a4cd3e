"""What one attention layer was told at patch time: for each role its heads, store, prefill patterns and selection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..decode.base import SelectSpec
from ..decode.dense import Dense
from ..layout.heads import RoleHeads
from ..layout.rotation import Rotation
from ..layout.rows import Rows
from ..prefill.base import PatternSpec
from ..stores.base import StoreSpec

LETTERS = {"retrieval": "R", "streaming": "S"}
FEWEST = 128  # real tokens that make a forward the prompt of a sequence; verification steps add fewer


@dataclass(frozen=True)
class PrefillPlan:
    """How the retrieval heads of one layer read a prompt.

    Attributes:
        patterns: one spec per query head of the layer's retrieval KV heads, in their order.
        min_tokens: a sequence of fewer real tokens is read densely.
        share_groups: one list per KV head, the union of its query heads' lists.
    """

    patterns: tuple[PatternSpec, ...]
    min_tokens: int
    share_groups: bool

    def runs(self, new: int, processed: int) -> bool:
        """Whether the patterns run for a sequence to which this forward adds ``new`` tokens, ``processed`` in all."""
        return new >= FEWEST and processed >= self.min_tokens


@dataclass(frozen=True)
class RolePlan:
    """How the KV heads of one role are kept and read in one layer.

    Attributes:
        heads: which heads these are; there may be none.
        store: the spec of their store.
        prefill: their patterns; None where all of them read densely.
        dense_tail: last tokens of a prompt that read all that the store still has of it, not by the store's rule.
        decode: which cached tokens a decoded token reads.
        as_stock: Transformers' own attention call computes them (``kernel: stock``), wherever it can be made.
        rotation: of their queries and keys; None where no score of the store asks for it, or the model has no numbers.
    """

    heads: RoleHeads
    store: StoreSpec
    prefill: PrefillPlan | None = None
    dense_tail: int = 0
    decode: SelectSpec = field(default_factory=Dense)
    as_stock: bool = False
    rotation: Rotation | None = None

    @property
    def selects(self) -> bool:
        """Whether decoded tokens may leave out cached ones."""
        return not self.decode.reads_all

    def selecting(self, rows: Rows) -> bool:
        """Whether some token of this forward may leave out cached tokens.

        A forward of `FEWEST` new tokens is a prompt, and so is the first of a sequence: their tokens read by the
        store's rule. All others are decoded tokens, drafts among them.
        """
        if not self.selects or rows.new >= FEWEST:
            return False

        def make() -> bool:
            alike = not rows.padded and rows.ends is None
            return any(self.decodes(*rows.real(row), rows) for row in range(1 if alike else rows.batch))

        return rows.memo(("selecting", id(self.decode)), make)

    def decodes(self, new: int, processed: int, rows: Rows) -> bool:
        """Whether the selection is asked for the ``new`` of the ``processed`` tokens of a sequence."""
        return new > 0 and not self.prompts(new, processed, rows) and self.decode.runs(processed)

    def prompts(self, new: int, processed: int, rows: Rows) -> bool:
        """Whether the ``new`` of the ``processed`` tokens of a sequence are of a prompt."""
        return new > 0 and (new == processed or rows.new >= FEWEST)

    def tail(self, new: int) -> int:
        """How many of the ``new`` real tokens that a forward adds to a sequence are its dense tail."""
        return min(self.dense_tail, new) if new >= FEWEST else 0


@dataclass(frozen=True)
class LayerPlan:
    """Frozen, and all that patching leaves on an attention module.

    Attributes:
        layer_idx: index of the layer in the model and in the cache.
        roles: retrieval, then streaming; the KV heads of this process, under tensor parallel.
        kernel: the config's ``kernel`` word.
        window: tokens of the model's own sliding window, which replaces both roles' stores; None: it has none.
        scores: keyword of this module's attention call -> the field of `Scores` it fills.
    """

    layer_idx: int
    roles: tuple[RolePlan, ...]
    kernel: str = "auto"
    window: int | None = None
    scores: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(
        cls,
        layer_idx: int,
        letters: str,
        stores: Mapping[str, StoreSpec],
        kernel: str = "auto",
        *,
        prefill: PrefillPlan | None = None,
        dense_tail: int = 0,
        decode: SelectSpec | None = None,
        window: int | None = None,
        scores: Mapping[str, str] | None = None,
        rotation: Rotation | None = None,
    ) -> LayerPlan:
        """The plan of a layer.

        Args:
            letters: the role of each KV head, R or S.
            stores: role -> spec of its store.
            prefill, decode, rotation: of the retrieval heads.
            dense_tail: of the streaming heads, in tokens.
        """
        roles = []
        for role, letter in LETTERS.items():
            heads = RoleHeads(role, tuple(i for i, given in enumerate(letters) if given == letter), len(letters))
            dense = decode is None or layer_idx < decode.dense_layers
            retrieval = {"prefill": prefill, "decode": Dense() if dense else decode, "rotation": rotation}
            own = retrieval if role == "retrieval" else {"dense_tail": dense_tail}
            as_stock = kernel == "stock" and stores[role].reads_all and not scores
            roles.append(RolePlan(heads, stores[role], as_stock=as_stock, **own))
        return cls(layer_idx, tuple(roles), kernel, window, tuple((scores or {}).items()))

    @cached_property
    def filled(self) -> tuple[RolePlan, ...]:
        """The roles that have heads."""
        return tuple(role for role in self.roles if role.heads.kv_heads)

    @cached_property
    def kv_heads(self) -> int:
        """KV heads of the layer, on this process."""
        return self.roles[0].heads.total

    @cached_property
    def letters(self) -> str:
        """The role of each KV head, R or S."""
        found = [(head, LETTERS[role.heads.role]) for role in self.roles for head in role.heads.kv_heads]
        return "".join(letter for _, letter in sorted(found))

    @cached_property
    def word(self) -> str:
        """The kernel where Transformers' own call cannot be made."""
        return "auto" if self.kernel == "stock" else self.kernel

    @cached_property
    def learns(self) -> bool:
        """Whether some selection has an index that is settled where a prompt ends (`SelectSpec.queries`)."""
        return any(role.decode.queries for role in self.filled)

    @cached_property
    def tells_prompts(self) -> bool:
        """Whether the tokens of a prompt read otherwise than those that are decoded, in some head."""
        return any(
            role.prefill is not None or role.dense_tail or role.selects or role.store.by_data for role in self.filled
        )

    def selecting(self, rows: Rows) -> bool:
        """Whether some decoded token of this forward may leave out cached tokens, in some head."""
        return any(role.selecting(rows) for role in self.filled)

    def role(self, name: str) -> RolePlan:
        """The plan of ``retrieval`` or ``streaming`` heads."""
        return next(role for role in self.roles if role.heads.role == name)

    def facts(self) -> dict[str, Any]:
        """What a cache's plan must have in common with the model's, by the words of a message."""
        return {
            "roles": self.letters,
            "stores": [role.store for role in self.roles],
            "prefill": [(role.prefill, role.dense_tail) for role in self.roles],
            "decode": [role.decode for role in self.roles],
            "kernel": self.kernel,
            "window": self.window,
        }


def differing(plans: Sequence[LayerPlan], others: Sequence[LayerPlan]) -> list[str]:
    """In which facts plans of the same layers differ."""
    pairs = [(one.facts(), other.facts()) for one, other in zip(plans, others, strict=False)]
    names = pairs[0][0] if pairs else ()
    return [name for name in names if any(one[name] != other[name] for one, other in pairs)]
