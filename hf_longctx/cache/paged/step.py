"""One step of continuous batching: which requests bring tokens, and where in their pages those go and are read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...layout.forward import Forward, ForwardLog
from ...layout.rows import Rows

T = TypeVar("T")


class Request(NamedTuple):
    """What one request brings to a step.

    Attributes:
        name: its id.
        past: tokens it has cached.
        new: tokens it brings.
        low: column of the first of them, among those of all requests.
    """

    name: str
    past: int
    new: int
    low: int

    @property
    def columns(self) -> slice:
        return slice(self.low, self.low + self.new)


class Reads(NamedTuple):
    """The cached tokens that a prompt's chunk reads, of the KV heads of one role.

    Attributes:
        rows: of the pool, those of the first KV head, int64 ``[P]``: sinks, then a band up to the newest.
        sinks: how many are sinks; 0: they are a band from the first token on.
        first: row position of the first token of the band.
    """

    rows: Tensor
    sinks: int
    first: int


@dataclass
class Step:
    """The requests of one forward, in the order of their tokens.

        columns   0 1 2 | 3 4 5 6 7 8 9 | 10
                  each decoded request one, a prompt's chunk several

    Attributes:
        requests: all of them.
        device: of keys and values.
        log: what ran, for the report.
    """

    requests: Sequence[Request]
    device: torch.device
    log: ForwardLog = field(default_factory=ForwardLog)
    _memo: dict = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        """New tokens of all requests."""
        return self.requests[-1].columns.stop

    @cached_property
    def decoded(self) -> list[Request]:
        """Those that bring one token."""
        return [one for one in self.requests if one.new == 1]

    @cached_property
    def prompts(self) -> list[Request]:
        """Those that bring several."""
        return [one for one in self.requests if one.new > 1]

    @cached_property
    def columns(self) -> slice | Tensor:
        """Of the tokens of `decoded`: a slice where they are neighbours."""
        low = [one.low for one in self.decoded]
        if low == list(range(low[0], low[0] + len(low))):
            return slice(low[0], low[0] + len(low))
        return torch.tensor(low, device=self.device)

    @cached_property
    def decoding(self) -> Forward:
        """The forward of `decoded`, whose attention is computed in one call."""
        return Forward(Rows(len(self.decoded), max(one.past for one in self.decoded), 1), self.log)

    @cached_property
    def prompting(self) -> list[Forward]:
        """The forward of each of `prompts`, which is computed as if it were alone."""
        return [Forward(Rows(1, one.past, one.new), self.log, prompt=True) for one in self.prompts]

    def memo(self, key: Any, make: Callable[[], T]) -> T:
        """What all layers of this step share, made once."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]
