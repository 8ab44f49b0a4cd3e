"""Why a short prompt takes more than a dense cache, and from how many tokens on it takes less: said and true."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.caches import patched_tiny, read
from helpers.store_cases import CASES, patched_case

from hf_longctx import LongCtxCache, report
from hf_longctx.cache.break_even import Form
from hf_longctx.stores.base import Reserve


def share(model, tokens: int, **kwargs) -> float:
    """Bytes really held after a prompt, of those of a dense cache; once it has ended, where tokens leave then."""
    cache = LongCtxCache(model, **kwargs)
    read(model, cache, torch.randint(3, 97, (1, tokens)))
    dense = cache.nbytes_dense
    if cache.evicts:
        read(model, cache, torch.randint(3, 97, (1, 1)))
    assert cache.nbytes == Form.of(cache).nbytes(tokens)
    return cache.nbytes / dense


@pytest.mark.parametrize(
    ("roles", "kwargs", "tokens"),
    [
        ("mixed", {"rollback": False}, 366),
        ("mixed", {}, 659),
        ("streaming", {"rollback": False}, 321),
        ("streaming", {}, 577),
        ("mixed", {"max_tokens": 900}, 739),
        ("streaming", {"max_tokens": 900, "rollback": False}, 321),
    ],
)
def test_the_break_even_is_where_the_bytes_say(roles, kwargs, tokens):
    """Windows of 64 + 256: with half of the heads 320 / (2 - 1.125) tokens, and more where 256 can be taken back."""
    model = patched_tiny(roles, 64, 256)
    cache = LongCtxCache(model, **kwargs)
    read(model, cache, torch.randint(3, 97, (1, 16)))
    assert report(model).saves_from == tokens
    assert share(model, tokens - 1, **kwargs) >= 1 > share(model, tokens, **kwargs)


@pytest.mark.spanning
@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_store_s_break_even_is_that_of_its_bytes(case, rollback):
    # A token more changes no bytes of a store that evicts, but those of a window.
    model = patched_case(case, torch.float32, "retrieval" if case.startswith("evicted") else "mixed")
    cache = LongCtxCache(model, rollback=rollback)
    read(model, cache, torch.randint(3, 97, (1, 16)))
    form = Form.of(cache)
    saves = [form.saves(tokens) for tokens in range(1, 4000)]
    if (found := form.saves_from) is None:
        assert not any(saves[2000:])
    else:
        assert not saves[found - 2] and all(saves[found - 1 :])
        for tokens in (found - 1, found, 1000):
            assert (share(model, tokens, rollback=rollback) < 1) == saves[tokens - 1]


def test_lengths_between_steps_are_not_taken_for_the_last():
    """Room grows by steps of 8 tokens and more, so near the break-even savings come and go."""
    rng, mixed = random.Random(0), 0
    model = patched_tiny("mixed", 4, 30)
    cache = LongCtxCache(model)
    read(model, cache, torch.randint(3, 97, (1, 16)))
    specs = [spec for spec, _ in Form.of(cache).heads]
    for _ in range(30):
        counts = (rng.randint(1, 40), rng.randint(1, 10))
        form = Form(tuple(zip(specs, counts, strict=True)), 8, 4, Reserve(None, rng.choice([0, 255])))
        saves = [form.saves(tokens) for tokens in range(1, 20_000)]
        last = max(at for at, saved in enumerate(saves) if not saved) + 1
        if last < 15_000:  # else it never saves, or not within what was looked at
            assert form.saves_from == last + 1
            mixed += any(saves[:last])
    assert mixed > 3


def test_the_report_says_why():
    model = patched_tiny("mixed", 64, 256)
    model.generate(torch.randint(3, 97, (1, 16)), max_new_tokens=3)
    said = str(report(model))
    assert "200% of dense" in said
    assert "\n              more than dense below 366 tokens: buffers have room to grow\n" in said + "\n"
    model.generate(torch.randint(3, 97, (1, 400)), max_new_tokens=3)
    assert "more than dense" not in str(report(model)) and report(model).saves_from == 366
    read(model, LongCtxCache(model, max_tokens=900), torch.randint(3, 97, (1, 16)))
    cache = LongCtxCache(model, max_tokens=900)
    read(model, cache, torch.randint(3, 97, (1, 16)))
    assert "more than dense below 739 tokens: max_tokens=900 is reserved" in str(report(model))
    assert max(map(len, str(report(model)).split("\n"))) <= 80


def test_heads_that_all_keep_everything_never_save():
    model = patched_tiny("retrieval")
    model.generate(torch.randint(3, 97, (1, 400)), max_new_tokens=3)
    assert report(model).saves_from is None
    assert "more than dense at any length: buffers have room to grow" in str(report(model))
