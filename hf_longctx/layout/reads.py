"""Which cached keys the queries of one attention call read: the ``reads`` of `Kernel.attend`.

Shapes: ``B`` batch, ``n`` KV heads, ``T`` queries, ``S`` keys, ``D`` head_dim. A row position counts a sequence's own
tokens from 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .blocks import BlockList


@dataclass(frozen=True)
class All:
    """Every filled slot of every segment: one decoded token, or queries that come after all of these keys."""


@dataclass(frozen=True)
class Causal:
    """The queries are the last ``T`` tokens of the last segment, by each sequence's own length; the others are past."""


@dataclass(frozen=True)
class Window:
    """A streaming window: two segments, the sinks at the row positions 0.. and the band from ``first`` on.

        sinks  0 .. s-1          band  first .. first+N-1, the last T of which are the queries
        |######|  (dropped)      |---------------|
                       query i reads  i-recent+1 .. i  of the band, and the sinks r <= i

    StreamingLLM, arXiv:2309.17453. The band holds every position a query reads: where its first queries are sinks
    themselves (N < T cannot be), first == s.

    Attributes:
        recent: tokens of the window, the query's own among them; at least 1.
        first: row position of the band's first key; not below the number of sinks.
    """

    recent: int
    first: int


@dataclass(frozen=True, eq=False)
class Averaged:
    """As `Window`, but the window's length depends on the query, and all keys between sinks and window are one mean.

    RazorAttention, arXiv:2407.15891. The mean counts as one key whose score has the log of their number added.

    Attributes:
        sink: first tokens of a sequence, which every later query reads.
        first: row position of the band's first key; at least ``sink``.
        end: row position after the last query.
        edge: first row position of a query's window, by the query's; nondecreasing, never below ``sink``.
        edges: the same of every query of the call, int64 ``[T]``.
        dropped: sums of the keys and of the values at the positions ``sink .. first - 1``, float64 ``[B, n, 1, D]``;
            None: there are none.
    """

    sink: int
    first: int
    end: int
    edge: Callable[[int], int]
    edges: Tensor
    dropped: tuple[Tensor, Tensor] | None


Reads = All | Causal | Window | Averaged | BlockList
ALL = All()
CAUSAL = Causal()
