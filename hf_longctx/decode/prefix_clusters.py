"""``select: prefix_clusters``: read the clusters of a prefix that weigh more than a threshold, one for all heads.

Squeezed Attention, arXiv:2411.09688.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..config.bounds import MOST, SHARE, TOKENS
from ..layout.gather import keys, shape_of
from ._growing import map_shared
from ._kmeans import ITERATIONS, clustered, means, sizes
from ._ranked import Ranked, ascending
from .base import Cached, Chosen, Index, Select

PERCENT = {"above": 0.0, "max": 100.0}
EVERYTHING = torch.finfo(torch.float64).min  # a threshold that every cluster passes
TOO_FEW = (
    "prefix_clusters: read every token, where a prompt was too short or too few of its last queries are known (it was "
    "cropped deep, observed, or filled by hand). Read the prompt again from its beginning, or as a longer one."
)


@dataclass(frozen=True)
class PrefixClusters(Select):
    """Read the clusters of a prefix of which the query expects more attention than a threshold.

    The prefix is what PromptCache has read, for all that go on from it; otherwise the prompt: all tokens before the
    first that is decoded. What follows it is always read, later prompts of a chat too, and so are its last tokens, as
    many as are observed or as ``recent``. Its other tokens but the sinks are clustered, by k-means of their normalised
    keys. A cluster's weight for a query is the softmax, over the clusters and the numbers of their tokens, of its mean
    key times the query; the query heads of a KV head are averaged. The threshold belongs to the prefix: it is the
    weight below which ``quantile`` of the tokens lie, of all layers and KV heads of this process that select, for the
    prefix's last queries on average. So a head that attends to few tokens reads few.

    Attributes:
        budget: tokens that are chosen at most, in clusters of the highest weight. On a GPU lists are so wide, or as
            wide as the prefix.
        percent: clusters, as a percentage of the clustered tokens.
        observation: last tokens of the prefix, whose queries give the threshold.
        quantile: share of the tokens that these queries leave out.
        iterations: of k-means, from evenly spaced keys.
    """

    cases: ClassVar = (
        {"percent": 20.0, "observation": 8, "quantile": 0.5},
        {"percent": 10.0, "observation": 20, "quantile": 0.7, "refresh": 4},
        {"percent": 30.0, "observation": 8, "quantile": 0.3, "budget": 24, "mass": 0.9},
        {"percent": 20.0, "observation": 8, "share": 0.2, "similar": 0.5, "refresh": 32},
    )

    saved: ClassVar = ("sink", "recent", "percent", "observation", "quantile", "iterations")

    budget: int = field(default=MOST, metadata=TOKENS)
    percent: float = field(default=5.0, metadata=PERCENT)
    observation: int = field(default=100, metadata=TOKENS)
    quantile: float = field(default=0.7, metadata=SHARE)
    iterations: int = field(default=10, metadata=ITERATIONS)

    @property
    def queries(self) -> int:
        return self.observation

    def new_index(self) -> PrefixIndex:
        return PrefixIndex(self)

    def runs(self, processed: int) -> bool:
        return processed >= self.min_tokens

    def clusters(self, tokens: int) -> int:
        """How many clusters so many tokens have."""
        return max(1, math.ceil(self.percent / 100 * tokens))

    def clustered(self, prefix: int) -> tuple[int, int]:
        """Which tokens of a prefix of so many are clustered: from, to."""
        return self.sink, max(self.sink, prefix - max(self.observation, self.recent))

    def nbytes(self, tokens: int, head_dim: int, itemsize: int) -> int:
        low, high = self.clustered(tokens)
        return (self.clusters(high - low) * (head_dim * itemsize + 8) + 8 * (high - low)) if high > low else 0

    def settle(self, indexes: Sequence[PrefixIndex], cached: Sequence[Cached]) -> None:
        weights = []
        counts = []
        for index, own in zip(indexes, cached, strict=True):
            index.cluster(own)
            weights.append(index.weights(index.seen, 1.0).flatten(1).double())
            counts.append(index.counts.flatten(1))
        devices = {index.device for index in indexes}
        here = weights[0].device
        threshold = quantile(*(torch.cat([x.to(here) for x in all_], 1) for all_ in (weights, counts)), self.quantile)
        on = {device: threshold.to(device) for device in devices}
        for index in indexes:
            index.settled(on[index.device])

    def choose(self, q: Tensor, index: PrefixIndex, cached: Cached, position: int, scale: float) -> Chosen:
        if index.threshold is None:
            nothing = torch.empty(q.shape[0], shape_of(cached)[1], 0, dtype=torch.int32, device=q.device)
            return Chosen(1, 0, 0, nothing, note=TOO_FEW)
        index.extend(cached, index.high)
        ranked = Ranked.of(index.weights(q, scale), index.counts)
        most = min(self.width(position + 1), index.high - index.low)
        above = ranked.counts.masked_fill(ranked.votes <= index.threshold, 0).sum(-1, keepdim=True)
        limit = above.minimum(ranked.limit(most, self.mass))
        width = int(limit.max()) if limit.device.type == "cpu" else most
        entries = index.order.gather(2, ranked.places(width))
        return Chosen(1, index.low, index.high, ascending(entries, limit, position), limit[..., 0].int())


class PrefixIndex(Index):
    """The clusters of a prefix; nothing of it is written twice, so forks share it.

    Attributes:
        tokens: of the prefix, as far as its queries were seen.
        seen: its last queries, scaled, ``[B, H, T, D]``; None before the first, and when it is settled.
        kept: how many these are.
        done: 1 where it is settled.
        low, high: the clustered tokens.
        of: the cluster of each, int32 ``[B, n, N]``; None before it is settled.
        threshold: float64 ``[B, 1, 1]``, of the logarithm of a weight.
        keys: mean keys, ``[B, n, C, D]``; made of the cached keys where they are not there, as after a file.
        counts: tokens of each cluster, ``[B, n, C]``.
        order: the tokens by cluster, int32 ``[B, n, N]``.
    """

    numbers = ("tokens", "kept", "done")

    def __init__(self, spec: PrefixClusters):
        self.spec = spec
        self._forget()

    def _forget(self) -> None:
        self.tokens = self.low = self.high = 0
        self.seen = self.of = self.threshold = self.keys = self.counts = self.order = None

    @property
    def kept(self) -> int:
        return 0 if self.seen is None else self.seen.shape[2]

    @property
    def done(self) -> int:
        return int(self.threshold is not None)

    @property
    def waits(self) -> bool:
        low, high = self.spec.clustered(self.tokens)
        return self.kept == self.spec.observation and low < high

    @property
    def device(self) -> torch.device:
        return self.of.device

    def saw(self, q: Tensor, position: int, scale: float) -> None:
        if self.threshold is None and position == self.tokens:
            last = q[:, :, -self.spec.observation :].detach() * scale
            with torch.inference_mode(False):  # so that the cache can be continued outside of inference mode
                both = last if self.seen is None else torch.cat([self.seen, last.to(self.seen)], 2)
                self.seen = both[:, :, -self.spec.observation :].clone()
            self.tokens += q.shape[2]

    def cluster(self, cached: Cached) -> None:
        """Cluster the prefix, one KV head after the other."""
        self.low, self.high = self.spec.clustered(self.tokens)
        k = keys(cached, self.low, self.high)
        count = self.spec.clusters(self.high - self.low)
        found = []
        for head in range(k.shape[1]):
            own = k[:, head : head + 1]
            wide = own.to(torch.promote_types(own.dtype, torch.float32))
            found.append(clustered(torch.nn.functional.normalize(wide, dim=3), count, self.spec.iterations))
        self.of = torch.cat(found, 1).int()
        self._build(k)

    def _build(self, k: Tensor) -> None:
        """What is made of the keys ``[B, n, N, D]`` and their clusters."""
        count = self.spec.clusters(self.high - self.low)
        of = self.of.long()
        self.counts = sizes(of, count)
        heads = [slice(head, head + 1) for head in range(k.shape[1])]
        self.keys = torch.cat([means(k[:, h], of[:, h], self.counts[:, h]) for h in heads], 1).to(k.dtype)
        self.order = (of.argsort(dim=-1, stable=True) + self.low).int()

    def settled(self, threshold: Tensor) -> None:
        """The prefix ends, with this threshold."""
        self.threshold = threshold
        self.seen = None

    def extend(self, cached: Cached, tokens: int) -> None:
        if self.keys is None:
            self._build(keys(cached, self.low, self.high))

    def weights(self, q: Tensor, scale: float) -> Tensor:
        """The logarithm of each cluster's weight for one of its tokens, mean over queries and heads, ``[B, n, C]``."""
        wide = torch.promote_types(q.dtype, torch.float32)
        grouped = q.to(wide).unflatten(1, (self.keys.shape[1], -1)).flatten(2, 3)
        scores = grouped @ self.keys.to(wide).transpose(2, 3) * scale
        scores = scores - (scores + self.counts.to(wide).log()[:, :, None]).logsumexp(-1, keepdim=True)
        return scores.logsumexp(2) - math.log(grouped.shape[2])

    def crop(self, tokens: int) -> None:
        """The clusters stay while all clustered tokens do: what follows those is read in any case."""
        if self.threshold is not None:
            if tokens < self.high:
                self._forget()
        elif tokens < self.tokens:
            left = self.kept - (self.tokens - tokens)
            self.seen = self.seen[:, :, :left].clone() if left > 0 else None
            self.tokens = tokens

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in TENSORS:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, map_shared(tensor, change))

    def fork(self) -> PrefixIndex:
        return copy.copy(self)

    def tensors(self) -> Iterator[Tensor]:
        return (tensor for name in TENSORS if (tensor := getattr(self, name)) is not None)

    def saved(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in ("seen", "of", "threshold")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def expected(
        self, numbers: Mapping[str, int], tokens: int, shape: tuple[int, int, int, int], dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        batch, kv_heads, heads, dim = shape
        prefix, kept, done = (numbers[name] for name in self.numbers)
        low, high = self.spec.clustered(prefix)
        if done:
            if done > 1 or kept or not low < high <= tokens:
                raise ValueError(f"a prefix of {prefix} of {tokens} tokens with {kept} queries is not settled")
            clusters = (torch.int32, (batch, kv_heads, high - low))
            return {"of": clusters, "threshold": (torch.float64, (batch, 1, 1))}
        if prefix > tokens or kept > min(self.spec.observation, prefix):
            raise ValueError(f"a prefix of {prefix} of {tokens} tokens has no {kept} last queries")
        return {"seen": (dtype, (batch, heads, kept, dim))} if kept else {}

    def restore(self, numbers: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        self.tokens = numbers["tokens"]
        self.low, self.high = self.spec.clustered(self.tokens)
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        if self.of is not None:
            least, most = torch.aminmax(self.of)
            if least < 0 or most >= self.spec.clusters(self.high - self.low):
                raise ValueError(f"its clusters are from {int(least)} to {int(most)}")


TENSORS = ("seen", "of", "threshold", "keys", "counts", "order")


def quantile(weights: Tensor, counts: Tensor, share: float) -> Tensor:
    """The threshold ``[B, 1, 1]`` that clusters of at most this share of the tokens do not pass.

    Args:
        weights: of clusters, float64 ``[B, N]``; equal ones pass together.
        counts: their tokens, ``[B, N]``.
    """
    weights = weights.masked_fill(counts == 0, float("inf"))
    ordered, at = weights.sort(dim=-1)
    tokens = counts.gather(1, at).cumsum(-1)
    ends = torch.searchsorted(ordered, ordered, right=True) - 1
    fits = (tokens.gather(1, ends) <= share * tokens[:, -1:]) & ordered.isfinite()
    below = ordered.masked_fill(~fits, EVERYTHING).amax(-1)
    return below[:, None, None]
