"""``select: clusters``: read the clusters of keys that the query is nearest to, and estimate the next best ones.

RetrievalAttention, arXiv:2409.10516, in the form of its successor RetroInfer: k-means inside segments of the context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..config.bounds import SHARE, TOKENS
from ..errors import ConfigError
from ..kernels.reference import products
from ..layout.gather import keys_and_values
from ..layout.segments import Segment
from ._growing import Growing, room
from ._kmeans import ITERATIONS, clustered, means, sizes
from ._ranked import Ranked, ascending
from ._votes import vote
from .base import Cached, Chosen, Index, Select


@dataclass(frozen=True)
class Clusters(Select):
    """Read the tokens of the best clusters of keys, and one mean for each of the next best ones.

    The tokens after the sinks are clustered in whole segments, and what follows the last whole one in batches; both are
    counted from a sequence's first token, so the clusters are those of the keys, however the text was cut. Tokens that
    fill no batch yet are read one by one, as the newest are. Clusters are ranked by their mean key times the query, the
    query heads of a KV head together by the highest of their scores. The best are read until the budget is full. What
    is left of the cluster in which it ends is estimated with the next ones: its mean value, weighted by the mean key
    and the number of its tokens. The published method reads the best 1.8 % (``share: 0.018``), clusters the whole
    prompt at once and never again, and extends that by batches.

    Attributes:
        segment: tokens that are clustered together.
        per: tokens for which there is one cluster.
        every: tokens of a batch; divides ``segment``.
        estimate: share of the clusters that are represented by their means.
        iterations: of k-means, from evenly spaced keys.
    """

    cases: ClassVar = (
        {"segment": 64, "every": 16, "per": 4, "budget": 24},
        {"segment": 32, "every": 32, "per": 8, "share": 0.1, "estimate": 0.5, "refresh": 4},
        {"segment": 48, "every": 16, "per": 4, "budget": 40, "mass": 0.8, "estimate": 0.0},
        {"segment": 32, "every": 8, "per": 2, "budget": 16, "similar": 0.5, "refresh": 32},
    )

    segment: int = field(default=8192, metadata=TOKENS)
    per: int = field(default=16, metadata=TOKENS)
    every: int = field(default=1024, metadata=TOKENS)
    estimate: float = field(default=0.232, metadata=SHARE)
    estimates: ClassVar[bool] = True
    iterations: int = field(default=5, metadata=ITERATIONS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segment % self.every:
            raise ConfigError(f"every: got {self.every}, expected a number that divides segment, {self.segment}.")

    def new_index(self) -> ClusterIndex:
        return ClusterIndex(self)

    def nbytes(self, tokens: int, head_dim: int, itemsize: int, max_tokens: int | None = None) -> int:
        low, high = self.between(tokens - 1)
        clusters = sum(-(-(b - a) // self.per) for a, b in self.batches(0, high))
        return room(clusters) * (2 * head_dim * itemsize + 4) + room(high - low) * 4

    def between(self, position: int) -> tuple[int, int]:
        """The tokens from which the query at ``position`` chooses: the clustered ones."""
        edge = max(0, position + 1 - self.recent) // self.every * self.every
        return self.sink, max(self.sink, edge)

    def batches(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """(first token, end) of what is clustered together of the tokens ``low .. high``, multiples of ``every``."""
        while low + self.every <= high:
            whole = low % self.segment == 0 and low + self.segment <= high
            end = low + (self.segment if whole else self.every)
            if end > self.sink:
                yield max(low, self.sink), end
            low = end

    def choose(self, q: Tensor, index: ClusterIndex, cached: Cached, position: int, scale: float) -> Chosen:
        low, high = self.between(position)
        index.extend(cached, high)
        ranked = Ranked.of(index.votes(q) * scale, index.counts)
        width = min(self.width(position + 1), high - low)
        limit = ranked.limit(width, self.mass)
        entries = ascending(index.order.take(ranked.places(width))[..., 0], limit, position)
        counts = None if self.mass is None else limit[..., 0].int()
        means = math.ceil(self.estimate * index.length)
        skipped = tuple(x.int() for x in ranked.next(limit, means)) if means else ()
        return self.again(Chosen(1, low, high, entries, counts, skipped=skipped), index, cached)

    def again(self, chosen: Chosen, index: ClusterIndex, cached: Cached) -> Chosen:
        index.extend(cached, chosen.high)
        return replace(chosen, estimate=index.estimate(*chosen.skipped)) if chosen.skipped else chosen


class ClusterIndex(Index):
    """The clusters of the tokens after the sinks.

    Attributes:
        keys, values: the means of each cluster's, ``[B, n, C, D]`` and ``[B, n, C, D_v]``.
        sizes: how many tokens each has, int32 ``[B, n, C, 1]``.
        order: the tokens by cluster, and by position in each; int32 ``[B, n, N, 1]``.
        ends: of each segment or batch, its end in tokens and in clusters.
    """

    def __init__(self, spec: Clusters):
        self.spec = spec
        self.keys, self.values, self.sizes, self.order = (Growing() for _ in range(4))
        self.ends: list[tuple[int, int]] = []

    @property
    def tokens(self) -> int:
        return self.ends[-1][0] if self.ends else 0

    @property
    def length(self) -> int:
        """How many clusters there are."""
        return self.keys.length

    @property
    def counts(self) -> Tensor:
        """Tokens of each cluster, int64 ``[B, n, C]``."""
        return torch.cat(self.sizes.views(), 2)[..., 0].long()

    def extend(self, cached: Cached, tokens: int) -> None:
        """Cover the first ``tokens`` tokens and no more; a segment that became whole is clustered anew."""
        segment = self.spec.segment
        self.crop(tokens)
        if self.tokens // segment < tokens // segment:
            self.crop(self.tokens // segment * segment)
        for low, high in self.spec.batches(self.tokens, tokens):
            self._add(*keys_and_values(cached, low, high), low)
            self.ends.append((high, self.length))

    def _add(self, k: Tensor, v: Tensor, low: int) -> None:
        clusters = -(-k.shape[2] // self.spec.per)
        of = clustered(k, clusters, self.spec.iterations)
        counts = sizes(of, clusters)
        self.keys.append(means(k, of, counts).to(k.dtype))
        self.values.append(means(v, of, counts).to(v.dtype))
        self.sizes.append(counts.int()[..., None])
        self.order.append((of.argsort(dim=-1, stable=True) + low).int()[..., None])

    def votes(self, q: Tensor) -> Tensor:
        """The highest product of each cluster's mean key and a query head of its KV head, ``[B, n, C]``, not scaled."""
        return torch.cat([vote(products(q, part), part.shape[1], "max") for part in self.keys.views()], 2)

    def estimate(self, cluster: Tensor, counts: Tensor) -> Segment:
        """Stands for so many tokens of each of these clusters, ``[B, n, M]`` both."""
        cluster = cluster.long()
        k = self.keys.take(cluster)
        bias = counts.to(torch.promote_types(k.dtype, torch.float32)).log()
        return Segment(k, self.values.take(cluster), cluster.shape[2], bias[:, :, None])

    def crop(self, tokens: int) -> None:
        while self.tokens > tokens:
            self.ends.pop()
        clusters = self.ends[-1][1] if self.ends else 0
        for one in (self.keys, self.values, self.sizes):
            one.crop(clusters)
        self.order.crop(max(0, self.tokens - self.spec.sink))

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for one in self._parts:
            one.map_rows(change)

    def fork(self) -> ClusterIndex:
        other = ClusterIndex(self.spec)
        other.keys, other.values, other.sizes, other.order = (one.fork() for one in self._parts)
        other.ends = list(self.ends)
        return other

    def tensors(self) -> Iterator[Tensor]:
        for one in self._parts:
            yield from one.tensors()

    @property
    def _parts(self) -> tuple[Growing, ...]:
        return self.keys, self.values, self.sizes, self.order
