"""The base of what becomes of evicted tokens: dropped, or merged into those that are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Left:
    """What one KV head of one sequence has left.

    Attributes:
        k, v: ``[S, D]``, in the order of the positions.
        bias: added to the scores of these tokens, float32 ``[S]``; None: nothing.
    """

    k: Tensor
    v: Tensor
    bias: Tensor | None = None


class After(ABC):
    """What a YAML word of ``eviction/after/`` defines.

    Attributes:
        biased: what is left may have a bias.
        cases: small settings, fields by name, that together show all it does; the tests run each of them.
    """

    roles: ClassVar[tuple[str, ...]] = ("retrieval",)
    biased: ClassVar[bool] = False
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    @abstractmethod
    def apply(self, k: Tensor, v: Tensor, bias: Tensor | None, keep: Tensor) -> Left:
        """What is left of the tokens k, v ``[S, D]`` of one KV head.

        Args:
            bias: of their scores, from an earlier eviction, float32 ``[S]``; None: nothing.
            keep: bool ``[S]``, which of them are kept.
        """
