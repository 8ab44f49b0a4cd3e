"""How the scores of an attention call are made from queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .heads import RoleHeads


@dataclass(frozen=True, eq=False)
class Scores:
    """``score = cap(q . k * scale)``, then biases, then the softmax over what is read and the sink.

    Attributes:
        scale: factor of the dot products.
        softcap: ``cap(x) = softcap * tanh(x / softcap)`` (Gemma 2, arXiv:2408.00118); None: ``cap(x) = x``.
        sinks: a logit per query head ``[H]`` that takes its share of the softmax and has no value (gpt-oss).
        first_bias: added to the score of each sequence's first token, per query head ``[H]``, after the cap
            (ACT, arXiv:2406.15765; ZeroTuning, arXiv:2505.11739).
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    first_bias: Tensor | None = None

    @property
    def by_head(self) -> bool:
        """Whether query heads have numbers of their own."""
        return self.sinks is not None or self.first_bias is not None

    def of(self, heads: RoleHeads) -> Scores:
        """Those of the query heads of these KV heads."""

        def own(x: Tensor | None) -> Tensor | None:
            return None if x is None else heads.take(x[None], x.shape[0] // heads.total)[0]

        return Scores(self.scale, self.softcap, own(self.sinks), own(self.first_bias)) if self.by_head else self
