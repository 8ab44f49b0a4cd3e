"""``select: recycle``: read everything now and then, and in between the tokens that had most attention then.

Recycled Attention, arXiv:2411.05787.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from ..config.bounds import TOKENS
from ..errors import ConfigError
from ._products import products_between
from .base import Cached, Chosen, Index, Select


@dataclass(frozen=True)
class Recycle(Select):
    """Read everything now and then, and in between the tokens that had most attention then.

    A full step reads every cached token: the first decoded one, the first at or after each multiple of ``refresh``, and
    with ``similar`` every one whose query has turned away from that of the last full step. The tokens after it read
    those to which it gave most attention, beside the sinks, what was recent at the full step and all newer ones. The
    paper keeps as many tokens as before and drops some for new ones; here no choice changes until the next full step.

    A token's attention is the largest of its softmax weights in the query heads of a KV head, so that each key is read
    once; how the paper reduces them is not known to us. The weights are over the tokens before its own,
    without a model's softcap and attention sinks. They cost the full step one more reading of the keys.

    Attributes:
        check: compare a query with ``similar`` only at positions that are a multiple of this.
    """

    cases: ClassVar = (
        {"budget": 16, "refresh": 8},
        {"budget": 40, "mass": 0.6, "refresh": 8},
        {"share": 0.2, "refresh": 32, "similar": 0.0},
        {"budget": 16, "refresh": 32, "similar": 0.8, "check": 5},
    )

    refresh: int = field(default=50, metadata=TOKENS)
    check: int = field(default=1, metadata=TOKENS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.check > 1 and self.similar is None:
            raise ConfigError(
                f"check: got {self.check} without similar, so nothing is compared. Set similar to the least cosine "
                "with which a choice is used again, or leave check out."
            )

    def compares(self, position: int) -> bool:
        return super().compares(position) and position % self.check == 0

    def reads(self, processed: int) -> int:
        """The mean of a full step and those after it, where none turns away."""
        return (processed + (self.refresh - 1) * super().reads(processed)) // self.refresh

    def choose(self, q: Tensor, index: Index, cached: Cached, position: int, scale: float) -> Chosen:
        return replace(super().choose(q, index, cached, position, scale), whole=True)

    def scores(self, q: Tensor, index: Index, cached: Cached, low: int, high: int, scale: float) -> Tensor:
        before = products_between(q, cached, 0, high + self.recent - 1) * scale
        return before.log_softmax(-1)[:, :, low:high]
