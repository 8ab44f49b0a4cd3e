"""The clusters of a prefix, in one layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..layout.gather import keys
from ._growing import map_shared
from ._kmeans import clustered, means, sizes
from ._ranked import Ranked, ascending
from ._weights import scores, total, weights
from .base import Cached, Index

if TYPE_CHECKING:
    from .prefix_clusters import PrefixClusters


class PrefixIndex(Index):
    """The clusters of a prefix; nothing of it is written twice, so forks share it.

    Attributes:
        tokens: of the prefix, as far as its queries were seen.
        seen: its last queries, scaled, ``[B, H, T, D]``; None before the first, and when it is settled.
        kept: how many these are.
        done: 1 where it is settled.
        low, high: the clustered tokens.
        of: the cluster of each, int32 ``[B, n, N]``; None before it is settled.
        top: the coarse cluster of each cluster, int32 ``[B, n, C]``; None with one level.
        threshold: of the logarithm of a weight, and of that of a coarse cluster, float64 ``[B, n, 1 or 2]``.
        keys: mean keys, ``[B, n, C, D]``; made of the cached keys where they are not there, as after a file.
        counts: tokens of each cluster, ``[B, n, C]``.
        order: the tokens by cluster, int32 ``[B, n, N]``.
        top_keys, top_counts, top_sizes: of coarse clusters, their mean keys, tokens, and how many clusters they have.
        top_order: the clusters by coarse cluster, int32 ``[B, n, C]``.
    """

    numbers = ("tokens", "kept", "done")

    def __init__(self, spec: PrefixClusters):
        self.spec = spec
        self._forget(0)

    def _forget(self, tokens: int) -> None:
        """From now on queries count that follow the first ``tokens`` tokens."""
        self.tokens = tokens
        self.low = self.high = 0
        for name in TENSORS:
            setattr(self, name, None)

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
            found.append(clustered(nn.functional.normalize(wide, dim=3), count, self.spec.iterations))
        self.of = torch.cat(found, 1).int()
        self._build(k)
        if coarse := self.spec.coarse_clusters(self.high - self.low):
            wide = self.keys.to(torch.promote_types(k.dtype, torch.float32))
            self.top = clustered(nn.functional.normalize(wide, dim=3), coarse, self.spec.iterations).int()
            self._build_top(k)

    def _build(self, k: Tensor) -> None:
        """What is made of the keys ``[B, n, N, D]`` and their clusters."""
        count = self.spec.clusters(self.high - self.low)
        of = self.of.long()
        self.counts = sizes(of, count)
        self.keys = _means(k, of, self.counts)
        self.order = (of.argsort(dim=-1, stable=True) + self.low).int()

    def _build_top(self, k: Tensor) -> None:
        top = self.top.long()
        self.top_sizes = sizes(top, self.spec.coarse_clusters(self.high - self.low))
        self.top_counts = torch.zeros_like(self.top_sizes).scatter_add_(2, top, self.counts)
        self.top_keys = _means(k, top.gather(2, self.of.long()), self.top_counts)
        self.top_order = top.argsort(dim=-1, stable=True).int()

    def settled(self, threshold: Tensor) -> None:
        """The prefix ends, with this threshold."""
        with torch.inference_mode(False):
            self.threshold = threshold.expand(-1, self.of.shape[1], -1).clone()
        self.seen = None

    def reopen(self, tokens: int) -> None:
        if self.threshold is not None:
            self._forget(tokens)

    def extend(self, cached: Cached, tokens: int) -> None:
        if self.keys is None:
            k = keys(cached, self.low, self.high)
            self._build(k)
            if self.top is not None:
                self._build_top(k)

    def seen_weights(self) -> list[tuple[Tensor, Tensor]]:
        """Of each level: weights for the seen queries, float64, and tokens, ``[B, all clusters]`` both."""
        levels = [(self.keys, self.counts)] + ([] if self.top is None else [(self.top_keys, self.top_counts)])
        found = []
        for mean_keys, counts in levels:
            products = scores(self.seen, mean_keys, 1.0)
            found.append((weights(products, total(products, counts)).flatten(1).double(), counts.flatten(1)))
        return found

    def ranked(self, q: Tensor, scale: float) -> Ranked:
        """The clusters by their weights for q ``[B, H, 1, D]``; those inside of coarse ones that pass."""
        if self.top is None:
            products = scores(q, self.keys, scale)
            return Ranked.of(weights(products, total(products, self.counts)), self.counts)
        coarse = scores(q, self.top_keys, scale)
        least = self.threshold[..., 1:]
        votes = weights(coarse, total(coarse, self.top_counts))
        best = Ranked.of(votes, self.top_sizes)
        limit = best.above(least)
        clusters = self.counts.shape[2]
        width = max(1, int(limit.max())) if limit.device.type == "cpu" else clusters
        inside = ascending(self.top_order.gather(2, best.places(width).clamp(max=clusters - 1)), limit, clusters).long()
        there = inside < clusters
        inside = inside.clamp(max=clusters - 1)
        counts = self.counts.gather(2, inside).masked_fill(~there, 0)
        own = scores(q, self.keys.gather(2, inside[..., None].expand(-1, -1, -1, self.keys.shape[3])), scale)
        others = total(coarse, self.top_counts.masked_fill(votes > least, 0))
        begins = (self.counts.cumsum(-1) - self.counts).gather(2, inside)
        return Ranked.of(weights(own, total(own, counts).logaddexp(others)), counts, begins)

    def crop(self, tokens: int) -> None:
        """The clusters stay while all clustered tokens do: what follows those is read in any case."""
        if self.threshold is not None:
            if tokens < self.high:
                self._forget(tokens)
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
        named = {name: getattr(self, name) for name in ("seen", "of", "top", "threshold")}
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
            found = {"of": (torch.int32, (batch, kv_heads, high - low))}
            if self.spec.coarse is not None:
                found["top"] = torch.int32, (batch, kv_heads, self.spec.clusters(high - low))
            return {**found, "threshold": (torch.float64, (batch, kv_heads, len(found)))}
        if prefix > tokens or kept > min(self.spec.observation, prefix):
            raise ValueError(f"a prefix of {prefix} of {tokens} tokens has no {kept} last queries")
        return {"seen": (dtype, (batch, heads, kept, dim))} if kept else {}

    def restore(self, numbers: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        self.tokens = numbers["tokens"]
        self.low, self.high = self.spec.clustered(self.tokens)
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        tokens = self.high - self.low
        for of, count in ((self.of, self.spec.clusters(tokens)), (self.top, self.spec.coarse_clusters(tokens))):
            least, most = (0, 0) if of is None else map(int, torch.aminmax(of))
            if least < 0 or most > max(0, count - 1):
                raise ValueError(f"its clusters are from {least} to {most}, expected 0 to {count - 1}")


TENSORS = ("seen", "of", "top", "threshold", "keys", "counts", "order")
TENSORS += ("top_keys", "top_counts", "top_sizes", "top_order")


def _means(k: Tensor, of: Tensor, counts: Tensor) -> Tensor:
    """`means` one KV head after the other, which takes less memory, in the dtype of the keys."""
    heads = [slice(head, head + 1) for head in range(k.shape[1])]
    return torch.cat([means(k[:, h], of[:, h], counts[:, h]) for h in heads], 1).to(k.dtype)
