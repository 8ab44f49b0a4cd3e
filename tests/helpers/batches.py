"""Prompts, what generate() answers to each alone, and what continuous batching answers to all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import continuous_api

from helpers.tiny import config_for, tiny_model
from hf_longctx import patch_model

SMALL = {"page_size": 5, "num_blocks": 150, "max_batch_tokens": 64}
WAIT = 20  # seconds after which something hangs


@pytest.fixture
def no_collection(monkeypatch):
    """Managers collect garbage twice where they end: most of what such a test would take."""
    monkeypatch.setattr(continuous_api, "gc", SimpleNamespace(collect=lambda: 0))


def patched(roles="mixed", family="llama", dtype=torch.float32, sink=5, recent=20, top=None, **model):
    """The same weights whatever the config; of heads that every kernel takes."""
    torch.manual_seed(0)
    made = tiny_model(family, dtype, **{"layers": 2, "head_dim": 16, **model})
    return patch_model(made, config_for(made, roles, sink, recent, **(top or {})))


def prompts(*lengths: int, seed: int = 3, vocab: int = 97) -> list[list[int]]:
    make = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (length,), generator=make).tolist() for length in lengths]


def alone(model, given: list[list[int]], new: int = 8, **how) -> list[list[int]]:
    """New tokens of generate(), one prompt after the other."""
    found = []
    for one in given:
        ids = torch.tensor([one])
        more = {"max_new_tokens": new, "do_sample": False, **how}
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), **more)[0, len(one) :].tolist())
    return found


def greedy(new: int = 8, **generation: Any) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": new, "do_sample": False, **generation})


def batched(model, given, new: int = 8, generation: dict | None = None, persistent: bool = False, **settings) -> list:
    """The outputs of generate_batch, in the order of the prompts."""
    asked = ContinuousBatchingConfig(**{**SMALL, **settings})
    found = model.generate_batch(given, greedy(new, **(generation or {})), asked, persistent_manager=persistent)
    return list(found.values())


def tokens(outputs: list) -> list[list[int]]:
    assert [one.error for one in outputs] == [None] * len(outputs)
    return [one.generated_tokens for one in outputs]


@contextmanager
def session(model, new: int = 8, generation: dict | None = None, **settings) -> Iterator:
    """A manager that runs; it is stopped hard if the test fails, so that no thread stays."""
    manager = model.init_continuous_batching(
        greedy(new, **(generation or {})), ContinuousBatchingConfig(**{**SMALL, **settings})
    )
    manager.warmup()  # makes the cache, as generate_batch does before it starts
    manager.start()
    try:
        yield manager
    except BaseException:
        manager.stop(hard_stop=True)
        raise
    manager.stop(timeout=WAIT)
    manager.destroy()


def take(manager, names: list[str]) -> list:
    """The last outputs of these requests, in their order; an error if one never comes."""
    found = {}
    end = time.monotonic() + WAIT
    while not found.keys() >= set(names):
        assert time.monotonic() < end, f"hangs: {sorted(set(names) - found.keys())} did not end"
        one = manager.get_result(timeout=0.5)
        if one is not None and one.is_finished():
            found[one.request_id] = one
    return [found[name] for name in names]


def until(happens, what: str) -> None:
    end = time.monotonic() + WAIT
    while not happens():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.001)


def all_free(cache) -> bool:
    """Whether no page belongs to a request, those apart that are kept for prompts that begin alike."""
    cache.evict_cached_blocks()
    cache.pool.try_to_free_sectors()
    return cache.nbytes == 0 and cache.compute_free_capacity() == 1.0
