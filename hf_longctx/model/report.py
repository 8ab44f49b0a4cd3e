"""What really ran: bytes kept against dense, blocks read, kernels used, and what fell back and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from ..cache.cache import LongCtxCache
from ..errors import UnsupportedModelError
from .modules import state_of
from .state import Kept


@dataclass(frozen=True, repr=False)
class Report:
    """Plain numbers about a patched model and the cache of its last forward.

    Attributes:
        kv_heads, retrieval_heads: KV heads of the whole model (of this process), and those that are retrieval heads.
        kept: what these do, in words.
        window_layers: layers that keep the model's own sliding window.
        forwards: forwards since patching.
        dense_tail: last tokens of a prompt that streaming heads read densely, by the config.
        tails, tail_tokens: rows times layers that had such a tail, and the tokens of these tails times layers.
        seen: tokens the last cache has seen, pads included; None when the last forward made none.
        nbytes, nbytes_dense: bytes it holds, and bytes a dense cache would hold.
        layers: bytes it holds per layer.
        offloaded: bytes that it keeps outside of the device by choice, by where they are.
        saves_from: tokens from which on a prompt in such a cache takes less than in a dense one, None where it never
            does: buffers have room to grow, and windows only save what is longer.
        reserved: its ``max_tokens``.
        alive: whether that cache still exists. If not (``generate`` drops it with its answer), the seven above are what
            was noted last: after the prompt, and then whenever the cache had grown by an eighth.
        kernels: kernels that ran.
        notes: what ran slower or otherwise than asked for.
        chosen, reused: decoded tokens (times rows and layers) for which a selection chose what retrieval heads read, or
            used its last choice again.
        read: share of the cached tokens that they read; None before the first.
        evictions: how often tokens left by score, of the layer where that was most often.
        evicted: share of the tokens of such heads that left, over all evictions; None before the first.
        evicted_at: tokens that were seen when the last of them left, pads included.
        steps: of continuous batching; in them at most so many ``requests`` had pages at once, of at most ``pages``
            bytes; with every KV head dense, of at most ``pages_dense``.
        sparse, dense: rows times layers whose prefill pattern ran, and whose rows were too short for it.
        density: share of the causal key blocks that the sparse ones read; None before the first.
        own_density: what it would be if each query head read its own list: less than ``density`` with
            ``share_groups``, else the same.
    """

    kv_heads: int
    retrieval_heads: int
    window_layers: tuple[int, ...]
    forwards: int
    kernels: tuple[str, ...]
    notes: tuple[str, ...]
    sparse: int = 0
    dense: int = 0
    density: float | None = None
    own_density: float | None = None
    dense_tail: int = 0
    chosen: int = 0
    reused: int = 0
    read: float | None = None
    kept: str = "keep every token"
    evictions: int = 0
    evicted: float | None = None
    evicted_at: int = 0
    steps: int = 0
    requests: int = 0
    pages: int = 0
    pages_dense: int = 0
    tails: int = 0
    tail_tokens: int = 0
    seen: int | None = None
    nbytes: int | None = None
    nbytes_dense: int | None = None
    layers: tuple[int, ...] = field(default=())
    offloaded: dict[str, int] = field(default_factory=dict)
    saves_from: int | None = None
    reserved: int | None = None
    alive: bool = False

    def __str__(self) -> str:
        lines = [
            f"KV heads      {self.retrieval_heads} of {self.kv_heads} {self.kept}, "
            f"{self.kv_heads - self.retrieval_heads} keep a constant number",
            f"forwards      {self.forwards}, kernels: {', '.join(self.kernels) or 'none yet'}",
        ]
        if self.window_layers:
            lines.append(f"own window    layers {', '.join(map(str, self.window_layers))}")
        if self.sparse or self.dense:
            read = "" if self.density is None else f", reading {self.density:.1%} of the causal blocks"
            if self.own_density != self.density:
                read += f" (each query head its own list: {self.own_density:.1%})"
            lines.append(f"prefill       {self.sparse} times sparse{read}, {self.dense} times dense (rows x layers)")
        if self.dense_tail:
            ran = f"{self.tails} times, {self.tail_tokens} tokens (rows x layers)"
            lines.append(f"dense tail    the last {self.dense_tail} tokens of a prompt: {ran}")
        if self.read is not None:
            again = (
                f", {self.reused / (self.chosen + self.reused):.0%} of the choices used again" if self.reused else ""
            )
            lines.append(f"decode        retrieval heads read {self.read:.1%} of their tokens{again}")
        if self.evicted is not None:
            times = f", {self.evictions} times" if self.evictions > 1 else ""
            when = f"the last time after {self.evicted_at} tokens"
            lines.append(f"evicted       {self.evicted:.1%} of the tokens of these heads{times}, {when}")
        if self.steps:
            share = self.pages / self.pages_dense
            at_once = f"{self.steps} steps, at most {self.requests} requests at once"
            lines.append(f"batching      {at_once}, in pages of {_mb(self.pages)}")
            lines.append(f"              {share:.0%} of dense {_mb(self.pages_dense)}")
        if self.nbytes is not None and self.nbytes_dense:
            share = self.nbytes / self.nbytes_dense
            gone = "" if self.alive else " (it is gone now)"
            kept = f"{_mb(self.nbytes)} after {self.seen} tokens"
            lines.append(f"KV cache      {kept}, {share:.0%} of dense {_mb(self.nbytes_dense)}{gone}")
            lines += [f"              {why}" for why in self._why_more()]
        elif self.forwards > self.steps:
            lines.append("KV cache      none alive, and none was continued after its prompt")
        elif not self.steps:
            lines.append("KV cache      none yet")
        lines += [f"offloaded     {_mb(count)} {place}" for place, count in self.offloaded.items()]
        lines += [f"note          {note}" for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__  # what a notebook shows

    def _why_more(self) -> Iterator[str]:
        """Why the cache takes more than a dense one, where it does."""
        if self.nbytes <= self.nbytes_dense:
            return
        why = "buffers have room to grow" if self.read is None else "room to grow, and an index"
        if self.reserved is not None:
            why = f"max_tokens={self.reserved} is reserved"
        if self.saves_from is None:
            yield f"more than dense at any length: {why}"
        elif self.seen < self.saves_from:
            yield f"more than dense below {self.saves_from} tokens: {why}"


def report(model: nn.Module) -> Report:
    """The report of a patched model; ``print(report(model))``.

    Raises:
        UnsupportedModelError: the model is not patched.
    """
    state = state_of(model)
    if state is None:
        raise UnsupportedModelError("report needs a patched model: call patch_model(model) first.")
    roles = "".join(plan.letters for plan in state.plans)
    log = state.log
    cache = state.last_cache
    alive = isinstance(cache, LongCtxCache)
    kept = Kept.by(cache) if alive else state.kept
    return Report(
        kv_heads=len(roles),
        retrieval_heads=roles.count("R"),
        kept=state.config.kept,
        window_layers=tuple(plan.layer_idx for plan in state.plans if plan.window is not None),
        forwards=state.forwards,
        kernels=tuple(sorted(log.used)),
        notes=tuple(sorted(log.notes)),
        sparse=log.prefill.sparse,
        dense=log.prefill.dense,
        density=log.prefill.density,
        own_density=log.prefill.own_density,
        chosen=log.decode.chosen,
        reused=log.decode.reused,
        read=log.decode.share,
        evictions=log.eviction.times,
        evicted=None if log.eviction.share is None else 1 - log.eviction.share,
        evicted_at=log.eviction.at,
        steps=log.batching.steps,
        requests=log.batching.requests,
        pages=log.batching.nbytes,
        pages_dense=log.batching.nbytes_dense,
        dense_tail=max(role.dense_tail for plan in state.plans for role in plan.filled),
        tails=log.prefill.tails,
        tail_tokens=log.prefill.tail_tokens,
        **({name: value for name, value in vars(kept).items() if name != "form"} if kept is not None else {}),
        saves_from=kept.form.saves_from if kept is not None and kept.seen else None,
        reserved=kept.form.reserve.max_tokens if kept is not None else None,
        alive=alive,
    )


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
