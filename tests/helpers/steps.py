"""Requests that come, grow in chunks, fork and go, over a cache in pages; and what each of their tokens must read."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import RequestState

from hf_longctx.cache.paged.cache import HeadPagedCache
from hf_longctx.cache.plan import LayerPlan
from hf_longctx.kernels.reference import attention, causal_visible, streaming_visible
from hf_longctx.layout.forward import ForwardLog
from hf_longctx.layout.scores import Scores
from hf_longctx.model.attention import attend_step
from hf_longctx.stores.full import Full
from hf_longctx.stores.sink_recent import SinkRecent

GROUP = 2
DIM = 16
SCALE = 0.6


def new_cache(letters, sink=5, recent=7, page=4, blocks=200, dtype=torch.float64, batch=4096, **plan) -> HeadPagedCache:
    """A cache of one layer for each word of ``letters``, such as ``"RSSR"``."""
    stores = {"retrieval": Full(), "streaming": SinkRecent(sink=sink, recent=recent)}
    plans = [LayerPlan.of(at, own, stores, **plan) for at, own in enumerate(letters)]
    heads = len(letters[0])
    config = LlamaConfig(
        num_hidden_layers=len(letters),
        hidden_size=GROUP * heads * DIM,
        num_attention_heads=GROUP * heads,
        num_key_value_heads=heads,
        head_dim=DIM,
    )
    asked = ContinuousBatchingConfig(page_size=page, num_blocks=blocks, max_batch_tokens=batch, max_memory_percent=0.5)
    cache = HeadPagedCache(plans, config, asked, DIM, torch.device("cpu"), dtype, True)
    cache.cache_tensor.view(dtype).fill_(float("nan"))  # what nobody wrote
    return cache


@dataclass
class Life:
    """One request: all its keys, values and queries of every layer, of which it has brought ``past`` tokens.

    Attributes:
        tensors: q ``[L, H, T, D]``, k and v ``[L, n, T, D]``.
    """

    state: RequestState
    tensors: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def new(cls, name: str, layers: int, heads: int, tokens: int, dtype: torch.dtype) -> Life:
        make = torch.Generator().manual_seed(hash((name, tokens)) % 1000)
        shapes = ((GROUP * heads, tokens), (heads, tokens), (heads, tokens))
        made = [torch.randn(layers, *shape, DIM, generator=make, dtype=torch.float64).to(dtype) for shape in shapes]
        return cls(RequestState(name, [0] * tokens), tuple(made))

    @property
    def past(self) -> int:
        return self.state.position_offset

    @property
    def left(self) -> int:
        return self.tensors[0].shape[2] - self.past


@dataclass
class World:
    """Some requests over one cache, and the largest error of their attention so far."""

    cache: HeadPagedCache
    sink: int
    recent: int
    lives: dict[str, Life] = field(default_factory=dict)
    error: float = 0.0
    steps: int = 0

    def step(self, chunks: dict[str, int], scores: Scores | None = None) -> bool:
        """One forward in which each of these requests brings so many tokens; False where the cache has no room."""
        cache = self.cache
        scores = scores or Scores(SCALE)
        for name, new in chunks.items():
            if not cache.can_store_request_tokens(self.lives[name].state, new):
                return False
        index = [[] for _ in cache.cache_allocators]
        for name, new in chunks.items():
            cache.extend_read_and_write_indices(name, self.lives[name].past, new, None, index)
        cache.begin(ForwardLog())
        for layer, plan in enumerate(cache.plans):
            q, k, v = (
                torch.cat([self._new(name, new)[at][layer] for name, new in chunks.items()], 1)[None] for at in range(3)
            )
            kv, _ = cache.update(k, v, layer, kwargs={})
            out = attend_step(plan, q, kv, scores)[0].transpose(0, 1)
            low = 0
            for name, new in chunks.items():
                want = self.truth(layer, name, new, scores)
                self.error = max(self.error, float((out[:, low : low + new] - want).abs().nan_to_num(9.0).max()))
                low += new
        for name, new in chunks.items():
            self.lives[name].state.position_offset += new
        self.steps += 1
        return True

    def _new(self, name: str, new: int):
        life = self.lives[name]
        return [x[:, :, life.past : life.past + new] for x in life.tensors]

    def truth(self, layer: int, name: str, new: int, scores: Scores) -> Tensor:
        """Outputs ``[H, new, D]`` over everything that the request ever brought, by the mask of each head's role."""
        life = self.lives[name]
        end = life.past + new
        q, k, v = (x[layer][None, :, :end] for x in life.tensors)
        masks = {"R": causal_visible(new, end), "S": streaming_visible(new, end, self.sink, self.recent)}
        letters = self.cache.plans[layer].letters
        visible = torch.stack([masks[letter] for letter in letters for _ in range(GROUP)])[None]
        bias = None
        if scores.first_bias is not None:
            bias = torch.zeros(1, len(visible[0]), 1, end, dtype=torch.float64)
            bias[0, :, 0, 0] = scores.first_bias
        return attention(q[:, :, end - new :], k, v, visible, scores.scale, bias, scores.softcap, scores.sinks)[0][0]

    def go(self, name: str) -> None:
        self.cache.free_blocks(self.lives.pop(name).state.request_id)

    def fork(self, name: str, others: list[str]) -> list[str]:
        """Requests that begin as this one did, and go on by themselves."""
        copies = {name: ([], []) for name in self.cache.cache_allocators}
        forked = self.cache.prepare_fork_request(self.lives[name].state, others, copies)
        self.cache.perform_cache_copy(copies)
        for other in forked:
            life = Life.new(other, *self._form())
            past = self.lives[name].past
            for own, theirs in zip(life.tensors, self.lives[name].tensors, strict=True):
                own[:, :, :past] = theirs[:, :, :past]
            life.state.position_offset = past
            self.lives[other] = life
        return forked

    def _form(self):
        _, k, _ = next(iter(self.lives.values())).tensors
        return k.shape[0], k.shape[1], k.shape[2], k.dtype


def wander(world: World, seed: int, steps: int, tokens: int = 70) -> None:
    """Requests that come and go in any order, with chunks of any size, over a cache that is often full."""
    rng = random.Random(seed)
    layers, heads = len(world.cache.plans), world.cache.plans[0].kv_heads
    names = iter(range(10_000))
    for _ in range(steps):
        if len(world.lives) < 6 and rng.random() < 0.5:
            name = f"r{next(names)}"
            world.lives[name] = Life.new(name, layers, heads, tokens, world.cache.dtype)
        chunks = {}
        for name in rng.sample(sorted(world.lives), len(world.lives)):
            left = world.lives[name].left
            if left and rng.random() < 0.8:
                chunks[name] = min(left, rng.choice([1, 1, 1, 2, 3, 8, 25]))
        while chunks and not world.step(chunks):
            world.go(full := rng.choice(sorted(world.lives)))  # as under memory pressure
            chunks.pop(full, None)
        grown = [name for name in world.lives if world.lives[name].past]
        if grown and len(world.lives) < 6 and rng.random() < 0.15:
            world.fork(rng.choice(grown), [f"r{next(names)}", f"r{next(names)}"])
        for name in [one for one, life in world.lives.items() if not life.left or rng.random() < 0.05]:
            world.go(name)
