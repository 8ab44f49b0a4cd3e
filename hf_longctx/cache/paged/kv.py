"""What continuous batching and a patched model's attention know of each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ...layout.forward import ForwardLog
from ...layout.segments import HeadKV
from ..layer_kv import InPlaceOfKeys
from .step import Step


@dataclass(eq=False)
class PagedKV(InPlaceOfKeys):
    """What a layer's pages offer the queries of a step, in place of its keys and of its values.

    Attributes:
        step: of the requests.
        decoded: what the requests that decode read, a part for each role that has heads; empty where none decodes.
        prompts: the same for each request that brings several tokens.
    """

    step: Step
    decoded: list[HeadKV]
    prompts: list[list[HeadKV]]


class StepCache(ABC):
    """A cache of many requests, each of which brings tokens of its own to a forward of one row."""

    @abstractmethod
    def begin(self, log: ForwardLog) -> Step:
        """The step of the requests whose tokens the next forward brings."""
