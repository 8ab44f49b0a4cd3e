"""Continuous batching: pages of single KV heads, by the masks of their roles, in float64 at every attention call."""

from __future__ import annotations

import pytest
import torch
from helpers.steps import Life, World, new_cache, wander

from hf_longctx.cache.paged.cache import LARGE, sector_bytes
from hf_longctx.errors import CacheError
from hf_longctx.layout.scores import Scores

ROLES = {"mixed": ["RSSR", "SRSS", "SSSS"], "retrieval": ["RR", "RR"], "streaming": ["SSS"], "one head": ["R", "S"]}
WINDOWS = [(5, 7), (0, 1), (3, 1), (0, 20), (1, 64)]
ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.mark.parametrize("roles", ROLES.values(), ids=ROLES.keys())
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_requests_that_come_and_go_read_what_their_roles_keep(window, roles):
    """Every page size and dtype with each is one of the slow tests."""
    dtype, page = (torch.float32, 31) if (sum(window) + len(roles)) % 2 else (torch.float64, 4)
    check(dtype, page, window, roles)


def check(dtype, page, window, roles):
    world = World(new_cache(roles, *window, page=page, blocks=1 + 220 // page, dtype=dtype), *window)
    wander(world, seed=page + sum(window), steps=40)
    assert world.error < ALLOWED[dtype] and world.steps > 20
    for name in list(world.lives):
        world.go(name)
    assert world.cache.nbytes == 0 < world.cache.counts.nbytes <= world.cache.cache_tensor.nbytes
    world.cache.evict_cached_blocks()
    world.cache.pool.try_to_free_sectors()
    assert world.cache.pool.num_free_sectors == world.cache.num_sectors


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_requests(seed):
    window = WINDOWS[seed % len(WINDOWS)]
    roles = list(ROLES.values())[seed % len(ROLES)]
    for dtype in ALLOWED:
        check(dtype, (5, 16)[seed % 2], window, roles)
    world = World(new_cache(roles, *window, page=(4, 5, 16, 31)[seed % 4], blocks=40), *window)
    wander(world, seed, steps=300, tokens=200)
    assert world.error < 1e-12


@pytest.mark.parametrize("off", [(5, 8), (5, 6), (4, 7), (6, 7)], ids=str)
def test_a_window_that_is_off_by_one_would_be_seen(off):
    """A control: tokens that a model decodes do not show it."""
    world = World(new_cache(ROLES["mixed"]), *off)
    wander(world, seed=1, steps=30)
    assert world.error > 1e-3


def test_pages_that_two_requests_took_would_be_seen():
    """A control of who owns what."""
    world = World(new_cache(ROLES["mixed"]), 5, 7)
    for name in "ab":
        world.lives[name] = Life.new(name, 3, 4, 70, torch.float64)
        world.step({name: 40})
    table = world.cache.cache_allocators["full_attention"].block_table
    table["b"][0] = table["a"][0]
    world.step({"a": 1, "b": 1})
    assert world.error > 1e-3


def test_scores_with_a_cap_and_a_bias_of_the_first_token():
    made = torch.linspace(-1, 2, 8, dtype=torch.float64)
    for scores in (Scores(0.6, 1.5), Scores(0.6, None, made), Scores(0.6, None, None, made)):
        world = World(new_cache(ROLES["mixed"][:2]), 5, 7)
        for name, chunks in {"a": (20, 1, 1), "b": (1, 30, 1)}.items():
            world.lives[name] = Life.new(name, 2, 4, 70, torch.float64)
            assert all(world.step({name: new}, scores) for new in chunks)
        assert world.step({"b": 1, "a": 1}, scores)
        assert world.error < 1e-12
        plain = World(world.cache, 5, 7, world.lives)
        plain.step({"a": 1}, Scores(0.6))
        assert (world.truth(0, "a", 1, scores) - world.truth(0, "a", 1, Scores(0.6))).abs().max() > 1e-3


def test_streaming_heads_take_no_more_pages_than_their_window():
    cache = new_cache(["RSSS"], sink=5, recent=27, page=8, dtype=torch.float32)
    world = World(cache, 5, 27)
    world.lives["a"] = Life.new("a", 1, 4, 400, torch.float32)
    world.step({"a": 399})
    world.step({"a": 1})
    token = 2 * 16 * 4
    assert cache.nbytes == (400 + 3 * 32) * token
    counts = cache.counts
    assert (counts.nbytes, counts.nbytes_dense, counts.steps) == (cache.nbytes, 4 * 400 * token, 2)


def test_pages_of_a_window_are_not_larger_than_it_needs():
    for window, page, want in ((320, 256, 160), (320, 64, 64), (55, 32, 28), (12, 256, 12)):
        cache = new_cache(["RS"], sink=2, recent=window - 2, page=page)
        assert cache.cache_allocators["sliding_attention"].tokens_per_page == want
        assert cache.cache_allocators["full_attention"].tokens_per_page == page


def test_a_sector_is_filled_by_the_blocks_of_either_role():
    for blocks in ([128 * 256, 128 * 160], [101, 155], [41 * 256, 49 * 160], [1, 89 * 20], [7]):
        size = sector_bytes(blocks, LARGE)
        assert all(size % block <= size / 32 for block in blocks) and size % max(blocks) == 0
    assert sector_bytes([101, 155], 10_000) == 310  # 7 are lost of each
    assert sector_bytes([101, 155], 300) == 155  # 54 are lost of each, and there are more of them


def test_requests_share_a_beginning_where_all_heads_keep_it():
    cache = new_cache(["RR"], page=4)
    assert cache.use_prefix_sharing and not new_cache(["RS"]).use_prefix_sharing
    world = World(cache, 5, 7)
    world.lives["a"] = Life.new("a", 1, 2, 70, torch.float64)
    world.step({"a": 21})
    life = world.lives["a"]
    life.state.initial_tokens = list(range(21))
    cache.mark_complete_blocks(life.state, {"full_attention": 5})
    assert cache.search_prefix_match("b", list(range(16)) + [99, 98]) == 16
    world.lives["b"] = Life.new("b", 1, 2, 70, torch.float64)
    for own, theirs in zip(world.lives["b"].tensors, life.tensors, strict=True):
        own[:, :, :16] = theirs[:, :, :16]
    world.lives["b"].state.position_offset = 16
    before = cache.nbytes
    assert world.step({"b": 9}) and world.step({"a": 1, "b": 1})
    assert world.error < 1e-12 and cache.nbytes - before == 3 * cache.cache_allocators["full_attention"].bytes_per_block


def test_a_forward_that_is_not_of_a_patched_model_is_refused():
    cache = new_cache(["RS"])
    with pytest.raises(CacheError, match="was unpatched"):
        cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0, kwargs={})


def test_more_long_requests_fit_into_the_memory_of_some_dense_ones():
    """Half of the heads stream: 8192 tokens of them take 320."""
    dense = 8
    for letters in (["RS"], ["RSSS", "RRRS"], ["RSR", "SRS"]):
        cache = new_cache(letters, sink=64, recent=256, page=256, blocks=dense * 8192 // 256, dtype=torch.bfloat16)
        fit = 0
        while cache.can_store_request_tokens(Life.new(f"r{fit}", 1, 1, 1, torch.bfloat16).state, 8192):
            fit += 1
        assert fit >= 1.7 * dense, letters
    assert cache.nbytes <= cache.cache_tensor.nbytes <= 1.03 * dense * 8192 * cache._dense_bytes
