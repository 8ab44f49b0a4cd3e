"""``select: prefix_clusters``: read the clusters of a prefix that weigh more than a threshold, one for all heads.

Squeezed Attention, arXiv:2411.09688.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..config.bounds import MOST, SHARE, TOKENS
from ..errors import ConfigError
from ..layout.gather import shape_of
from ._kmeans import ITERATIONS
from ._prefix_index import PrefixIndex
from ._ranked import ascending
from ._weights import quantile
from .base import Cached, Chosen, Select

PERCENT = {"above": 0.0, "max": 100.0}
TOO_FEW = (
    "prefix_clusters: read every token, where a prompt was too short or too few of its last queries are known (it was "
    "cropped deep, observed, or filled by hand). Read the prompt again from its beginning, or as a longer one."
)


@dataclass(frozen=True)
class PrefixClusters(Select):
    """Read the clusters of a prefix of which the query expects more attention than a threshold.

    The prefix is what PromptCache has read last, for all that go on from it; otherwise the prompt: all tokens before
    the first that is decoded. What follows it is always read, later prompts of a chat too, and so are its last tokens,
    as many as are observed or as ``recent``. Its other tokens but the sinks are clustered, by k-means of their
    normalised keys. A cluster's weight for a query is the softmax, over the clusters and the numbers of their tokens,
    of its mean key times the query; the query heads of a KV head are averaged. The threshold belongs to the prefix: it
    is the weight below which ``quantile`` of the tokens lie, of all layers and KV heads of this process that select,
    for the prefix's last queries on average. So a head that attends to few tokens reads few.

    With two levels the clusters' means are clustered again; clusters are weighed inside of coarse ones alone whose own
    weight passes a threshold of theirs, and the other coarse ones stand for what is in them.

    Attributes:
        budget: tokens that are chosen at most, in clusters of the highest weight. On a GPU lists are so wide, or as
            wide as the prefix.
        percent: clusters, as a percentage of the clustered tokens.
        observation: last tokens of the prefix, whose queries give the threshold.
        quantile: share of the tokens that these queries leave out.
        coarse: coarse clusters of a first level, as a percentage of the clustered tokens; null: there is one level.
        coarse_quantile: share of the tokens that the first level leaves out for these queries.
        iterations: of k-means, from evenly spaced keys.
    """

    cases: ClassVar = (
        {"percent": 20.0, "observation": 8, "quantile": 0.5},
        {"percent": 10.0, "observation": 20, "quantile": 0.7, "refresh": 4},
        {"percent": 30.0, "observation": 8, "quantile": 0.3, "budget": 24, "mass": 0.9},
        {"percent": 20.0, "observation": 8, "share": 0.2, "similar": 0.5, "refresh": 32},
        {"percent": 20.0, "observation": 8, "coarse": 5.0, "quantile": 0.6, "coarse_quantile": 0.4},
    )

    saved: ClassVar = (
        "sink",
        "recent",
        "percent",
        "observation",
        "quantile",
        "coarse",
        "coarse_quantile",
        "iterations",
    )

    budget: int = field(default=MOST, metadata=TOKENS)
    percent: float = field(default=5.0, metadata=PERCENT)
    observation: int = field(default=100, metadata=TOKENS)
    quantile: float = field(default=0.7, metadata=SHARE)
    coarse: float | None = field(default=None, metadata=PERCENT)
    coarse_quantile: float = field(default=0.5, metadata=SHARE)
    iterations: int = field(default=10, metadata=ITERATIONS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coarse is not None and self.coarse >= self.percent:
            raise ConfigError(f"coarse: got {self.coarse}, expected less than percent, {self.percent}.")

    @property
    def queries(self) -> int:
        return self.observation

    def new_index(self) -> PrefixIndex:
        return PrefixIndex(self)

    def runs(self, processed: int) -> bool:
        low, high = self.clustered(processed - 1)
        everything = self.quantile == 0 and self.mass is None and self.width(processed) >= high - low
        return processed >= self.min_tokens and not everything

    def reads(self, processed: int) -> int:
        """As if all but the last of ``processed`` tokens were the prefix, and the last query like those before it."""
        low, high = self.clustered(processed - 1)
        chosen = min(self.width(processed), math.ceil((1 - self.quantile) * (high - low)))
        return processed - (high - low - chosen) if self.runs(processed) else processed

    def clusters(self, tokens: int) -> int:
        """How many clusters so many tokens have."""
        return max(1, math.ceil(self.percent / 100 * tokens))

    def coarse_clusters(self, tokens: int) -> int:
        """How many coarse ones; 0: there is one level."""
        return 0 if self.coarse is None else max(1, math.ceil(self.coarse / 100 * tokens))

    def clustered(self, prefix: int) -> tuple[int, int]:
        """Which tokens of a prefix of so many are clustered: from, to."""
        return self.sink, max(self.sink, prefix - max(self.observation, self.recent))

    def nbytes(self, tokens: int, head_dim: int, itemsize: int, max_tokens: int | None = None) -> int:
        low, high = self.clustered(tokens - 1)
        if high <= low:
            return 0
        fine, coarse = self.clusters(high - low), self.coarse_clusters(high - low)
        more = coarse * (head_dim * itemsize + 16) + (8 * fine if coarse else 0)
        return fine * (head_dim * itemsize + 8) + 8 * (high - low) + more + (16 if coarse else 8)

    def settle(self, indexes: Sequence[PrefixIndex], cached: Sequence[Cached]) -> None:
        for index, own in zip(indexes, cached, strict=True):
            index.cluster(own)
        found = [index.seen_weights() for index in indexes]
        thresholds = []
        for level, share in enumerate((self.quantile, self.coarse_quantile)[: len(found[0])]):
            both = zip(*(one[level] for one in found), strict=True)
            here = found[0][0][0].device
            thresholds.append(quantile(*(torch.cat([x.to(here) for x in parts], 1) for parts in both), share))
        threshold = torch.cat(thresholds, 2)
        on = {device: threshold.to(device) for device in {index.of.device for index in indexes}}
        for index in indexes:
            index.settled(on[index.of.device])

    def choose(self, q: Tensor, index: PrefixIndex, cached: Cached, position: int, scale: float) -> Chosen:
        if index.threshold is None:
            nothing = torch.empty(q.shape[0], shape_of(cached)[1], 0, dtype=torch.int32, device=q.device)
            return Chosen(1, 0, 0, nothing, note=TOO_FEW, whole=True)
        index.extend(cached, index.high)
        ranked = index.ranked(q, scale)
        most = min(self.width(position + 1), index.high - index.low)
        limit = ranked.above(index.threshold[..., :1]).minimum(ranked.limit(most, self.mass))
        width = int(limit.max()) if limit.device.type == "cpu" else most
        entries = index.order.gather(2, ranked.places(width).clamp(max=index.high - index.low - 1))
        return Chosen(1, index.low, index.high, ascending(entries, limit, position), limit[..., 0].int())
