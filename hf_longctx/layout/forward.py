"""What belongs to one forward beside its geometry: the log for the report, the observer, the kernels chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from .rows import Rows


@dataclass
class PrefillCounts:
    """How retrieval heads with a pattern, and streaming heads with a dense tail, read their prompts, for the report.

    One-token forwards do not count.

    Attributes:
        sparse, dense: sequences times layers in which the patterns ran, or were too short for them.
        reads: key tokens read by the query heads of the sparse ones (per device, so that nothing waits).
        own_reads: what they would read if each query head read its own list; as ``reads`` without ``share_groups``.
        causal: what dense attention would read.
        tails, tail_tokens: sequences times layers in which streaming heads read the last tokens densely, and these
            tokens times layers.
    """

    sparse: int = 0
    dense: int = 0
    reads: dict[torch.device, Tensor] = field(default_factory=dict)
    own_reads: dict[torch.device, Tensor] = field(default_factory=dict)
    causal: int = 0
    tails: int = 0
    tail_tokens: int = 0

    def add_tail(self, tokens: int, sequences: int) -> None:
        self.tails += sequences
        self.tail_tokens += tokens * sequences

    def add(self, reads: Tensor, own_reads: Tensor, causal: int, sequences: int) -> None:
        self.sparse += sequences
        self.causal += causal
        for total, more in ((self.reads, reads), (self.own_reads, own_reads)):
            total[more.device] = more + total.get(more.device, 0)

    @property
    def density(self) -> float | None:
        """Share of the causal key blocks that was read; None before any sparse prefill. Reads the device."""
        return self._share(self.reads)

    @property
    def own_density(self) -> float | None:
        """``density`` if each query head read its own list. Reads the device."""
        return self._share(self.own_reads)

    def _share(self, reads: dict[torch.device, Tensor]) -> float | None:
        return sum(part.item() for part in reads.values()) / self.causal if self.causal else None


@dataclass
class DecodeCounts:
    """What selections read for decoded tokens, for the report.

    Attributes:
        chosen, reused: sequences times layers and tokens for which a selection chose, or used a choice again.
        cached: tokens that the KV heads of these had cached, summed.
        reads: how many of them they read (per device, so that nothing waits).
    """

    chosen: int = 0
    reused: int = 0
    cached: int = 0
    reads: dict[torch.device | None, Tensor | int] = field(default_factory=dict)

    def add(self, reads: Tensor | int, cached: int, sequences: int, reused: bool) -> None:
        self.cached += cached
        if reused:
            self.reused += sequences
        else:
            self.chosen += sequences
        key = reads.device if isinstance(reads, Tensor) else None
        self.reads[key] = reads + self.reads.get(key, 0)

    @property
    def share(self) -> float | None:
        """Share of the cached tokens that was read; None before any selection ran. Reads the device."""
        return sum(int(part) for part in self.reads.values()) / self.cached if self.cached else None


@dataclass
class EvictionCounts:
    """What left the caches, for the report.

    Attributes:
        at: tokens after which the last one happened, pads included.
        cached, kept: tokens of all heads, layers and sequences before and after them, summed over all evictions.
        by_layer: evictions of each layer.
    """

    at: int = 0
    cached: int = 0
    kept: int = 0
    by_layer: dict[int, int] = field(default_factory=dict)

    def add(self, layer: int, at: int, cached: int, kept: int) -> None:
        self.by_layer[layer] = self.by_layer.get(layer, 0) + 1
        self.at = at
        self.cached += cached
        self.kept += kept

    @property
    def times(self) -> int:
        """Evictions, of the layer that had most."""
        return max(self.by_layer.values(), default=0)

    @property
    def share(self) -> float | None:
        """Share of the tokens that was kept; None before any eviction."""
        return self.kept / self.cached if self.cached else None


@dataclass
class BatchingCounts:
    """Steps of continuous batching, for the report.

    Attributes:
        steps: forwards that brought tokens of requests.
        requests: the most that had pages at once.
        nbytes: the most bytes of their pages.
        nbytes_dense: the most that the same tokens would have taken, if every KV head kept them.
    """

    steps: int = 0
    requests: int = 0
    nbytes: int = 0
    nbytes_dense: int = 0

    def add(self, requests: int, nbytes: int, nbytes_dense: int) -> None:
        self.steps += 1
        self.requests = max(self.requests, requests)
        self.nbytes = max(self.nbytes, nbytes)
        self.nbytes_dense = max(self.nbytes_dense, nbytes_dense)


@dataclass
class ForwardLog:
    """What happened, for the report.

    Attributes:
        used: kernels that ran.
        notes: what ran slower than asked for.
        prefill: sparse prefills.
        decode: decoded tokens that read a selection.
        eviction: tokens that left.
        batching: steps of continuous batching.
    """

    used: set[str] = field(default_factory=set)
    notes: set[str] = field(default_factory=set)
    prefill: PrefillCounts = field(default_factory=PrefillCounts)
    decode: DecodeCounts = field(default_factory=DecodeCounts)
    eviction: EvictionCounts = field(default_factory=EvictionCounts)
    batching: BatchingCounts = field(default_factory=BatchingCounts)


@dataclass(frozen=True)
class Forward:
    """One forward of the base model; its pre-hook makes it and every layer gets it.

    Attributes:
        rows: where each sequence of the batch stands.
        log: filled while it runs.
        observer: see ``hf_longctx.observe``.
        cached: every layer must bring the cache that this forward was given or got, a ``LongCtxCache``.
        steps: it brings one token of each sequence, without pads, autocast or observer: a layer may write and read in
            one call of its kernel.
        prompt: its tokens are of a prompt: the first of a cache, or many, or as generate() says.
        kernels: what `hf_longctx.kernels.base` asked kernels, once: by (word, case) which one computes it, None where
            none reads its segments as they are; by (word, device) whether one launches whole layers.
    """

    rows: Rows
    log: ForwardLog = field(default_factory=ForwardLog)
    observer: Callable | None = None
    cached: bool = False
    steps: bool = False
    prompt: bool = False
    kernels: dict[tuple, ModuleType | bool | None] = field(default_factory=dict, repr=False, compare=False)
