"""What share of the cached tokens a decoded token reads where the config has a selection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..cache.break_even import first_where
from ..cache.plan import LayerPlan
from ..config.bounds import MOST
from ..config.words import spec_word
from ..decode.base import SelectSpec

PARTS = 1, 4, 16  # of the context: the lengths that are looked at


@dataclass(frozen=True)
class Decoded:
    """What a selection does at some lengths.

    Attributes:
        word: of the selection.
        dense: retrieval heads of layers in which it reads every token.
        heads: all retrieval heads.
        begins: fewest tokens of a sequence from which it leaves some out; None: it never does.
        reads: (tokens of a sequence, how many of them a decoded token reads in a layer that selects), longest first.
    """

    word: str
    dense: int
    heads: int
    begins: int | None
    reads: tuple[tuple[int, int], ...]

    def share(self, tokens: int, read: int) -> float:
        """The share of the cached tokens of all retrieval heads that is read."""
        return (self.dense * tokens + (self.heads - self.dense) * read) / (self.heads * tokens)

    def as_dict(self) -> dict[str, Any]:
        rows = [{"tokens": n, "reads": read, "share": self.share(n, read)} for n, read in self.reads]
        return {"select": self.word, "begins": self.begins, "reads": rows}

    def __str__(self) -> str:
        said = [f"{read} of {n} tokens ({read / n:.1%})" if read < n else f"all of {n}" for n, read in self.reads]
        n, read = self.reads[0]
        begins = "it never leaves one out" if self.begins is None else f"it selects from {self.begins} tokens on"
        text = f"{self.word}: a decoded token reads {', '.join(said)}; {begins}"
        if self.dense and read < n:
            layers = f"the first layers, which read all, hold {self.dense} of {self.heads} retrieval heads"
            text += f"; {layers}: together {self.share(n, read):.1%} of {n}"
        return text


def decoded(plans: Sequence[LayerPlan], context: int) -> Decoded | None:
    """What the selection of a patched model's plans reads at ``context`` tokens and shorter; None without one."""
    roles = [role for plan in plans for role in plan.filled if role.heads.role == "retrieval"]
    select = next((role.decode for role in roles if role.selects), None)
    if select is None:
        return None
    counts = [(len(role.heads.kv_heads), role.selects) for role in roles]
    lengths = dict.fromkeys(max(1, context // part) for part in PARTS)
    return Decoded(
        word=spec_word(select),
        dense=sum(count for count, selects in counts if not selects),
        heads=sum(count for count, _ in counts),
        begins=begins(select),
        reads=tuple((tokens, select.reads(tokens)) for tokens in lengths),
    )


def begins(select: SelectSpec) -> int | None:
    """Fewest tokens from which the selection leaves some out."""
    return first_where(select.runs, 0, MOST) if select.runs(MOST) else None
