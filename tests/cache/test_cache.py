"""LongCtxCache as a Transformers cache: lengths, growth, rollback, beams, copies; and that its memory is real."""

from __future__ import annotations

import copy
import io
import pickle
import random

import pytest
import torch
from helpers.caches import live_bytes, patched_tiny, read
from helpers.device_reads import CountReads
from helpers.tiny import config_for, left_padded, tiny_model

from hf_longctx import CacheError, LongCtxCache, patch_model
from hf_longctx.kernels import cpu
from hf_longctx.stores.base import SLACK


@pytest.mark.parametrize("lengths", [[300], [300, 300], [300, 120, 9], [30, 25, 1]])
def test_random_steps_and_rollbacks_equal_a_fresh_reading(lengths):
    model, rng = patched_tiny(recent=24), random.Random(len(lengths))
    ids, mask = left_padded([length + 120 for length in lengths])
    padded = len(set(lengths)) > 1
    cache, at = LongCtxCache(model), max(lengths)
    read(model, cache, ids[:, :at], mask[:, :at] if padded else None)
    for _ in range(25):
        if rng.random() < 0.45:
            back = rng.randint(1, 20)
            cache.crop(-back if rng.random() < 0.5 else at - back)
            at -= back
        step = rng.choice([1, 1, 1, 2, 5, 17])
        got = read(model, cache, ids[:, at : at + step], mask[:, : at + step] if padded else None)
        at += step
        assert cache.get_seq_length() == at
        want = read(model, LongCtxCache(model), ids[:, :at], mask[:, :at] if padded else None)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_a_rollback_may_use_the_whole_slack_and_no_more():
    model = patched_tiny()
    ids = torch.randint(3, 97, (1, 900))
    for back in (SLACK, SLACK + 1):
        cache = LongCtxCache(model)
        read(model, cache, ids[:, :700])
        for at in range(700, 705):
            read(model, cache, ids[:, at : at + 1])
        if back > SLACK:
            with pytest.raises(CacheError, match="cannot crop"):
                cache.crop(-back)
            continue
        cache.crop(-back)
        at = 705 - back
        got = read(model, cache, ids[:, at : at + 30])
        torch.testing.assert_close(got, read(model, LongCtxCache(model), ids[:, : at + 30]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("max_tokens", [None, 200])
def test_beams_copies_and_pickles(max_tokens):
    model = patched_tiny()
    ids, mask = left_padded([60, 9, 33])
    more = torch.ones(3, 1, dtype=mask.dtype)
    cache = LongCtxCache(model, max_tokens=max_tokens)
    read(model, cache, ids, mask)
    step = torch.tensor([[5], [6], [7]])
    want = read(model, copy.deepcopy(cache), step, torch.cat([mask, more], 1))
    assert cache.get_seq_length() == 60

    order = torch.tensor([2, 0, 0])
    beams = copy.deepcopy(cache)
    beams.reorder_cache(order)
    got = read(model, beams, step[order], torch.cat([mask[order], more], 1))
    torch.testing.assert_close(got, want[order], rtol=0, atol=1e-12)

    doubled = pickle.loads(pickle.dumps(cache))
    assert doubled.nbytes == cache.nbytes
    doubled.batch_repeat_interleave(2)
    each = torch.arange(3).repeat_interleave(2)
    got = read(model, doubled, step[each], torch.cat([mask[each], more[each]], 1))
    torch.testing.assert_close(got, want[each], rtol=0, atol=1e-12)

    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    chosen = torch.load(buffer, weights_only=False)
    chosen.batch_select_indices(torch.tensor([1]))
    got = read(model, chosen, step[1:2], torch.cat([mask[1:2], more[1:2]], 1))
    torch.testing.assert_close(got, want[1:2], rtol=0, atol=1e-12)
    assert (chosen.batch_size, doubled.batch_size, cache.batch_size) == (1, 6, 3)


def test_reset_frees_and_starts_anew():
    model = patched_tiny()
    cache = LongCtxCache(model)
    assert (cache.nbytes, cache.nbytes_dense, cache.get_seq_length(), cache.batch_size) == (0, 0, 0, -1)
    ids = torch.randint(3, 97, (2, 90))
    want = read(model, cache, ids)
    cache.reset()
    assert (cache.nbytes, cache.get_seq_length(), cache.batch_size) == (0, 0, -1)
    assert torch.equal(read(model, cache, ids), want)
    cache.crop(-90)
    assert cache.nbytes == 0
    assert torch.equal(read(model, cache, ids[:1]), read(model, LongCtxCache(model), ids[:1]))


def capacities(cache) -> list[tuple[int, int]]:
    """(slots allocated, tokens in them) of every store."""
    found = []
    for layer in cache.layers:
        for store in layer.stores:
            slots = sum(segment.k.shape[2] for segment in store.segments.values())
            found.append((slots, store.spec.cached_tokens(layer.seen)))
    return found


@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize("prompt", [1, 20, 63, 290, 310, 700, 3000])
def test_growth_is_bounded_and_already_there_at_prefill(prompt, rollback):
    model = patched_tiny(recent=300)
    cache = LongCtxCache(model, rollback=rollback)
    read(model, cache, torch.randint(3, 97, (1, prompt)))
    before = cache.nbytes
    for step in range(40):
        for slots, tokens in capacities(cache):
            dropped = min(255, cache.seen - tokens) if rollback else 0
            history = dropped + max(16, dropped // 8) + 1 if dropped else 0
            assert slots <= tokens + max(16, tokens // 8) + history
        read(model, cache, torch.randint(3, 97, (1, 1)))
        if step == 0:
            assert cache.nbytes == before, "the first decoded token must not copy the cache"


def written(model, tokens, step=1, **kwargs):
    """A cache of one layer filled by hand, ``step`` tokens at a time, and the slots copied when its buffer grew."""
    cache, copied, grown, held = LongCtxCache(model, **kwargs), 0, 0, None
    keys = torch.randn(1, 4, step, 8, dtype=torch.float64)
    for _ in range(tokens // step):
        cache.update(keys, keys, 0)
        segments = cache.layers[0].stores[0].segments
        places = [segment.k.data_ptr() for segment in segments.values()]
        if held is not None and places != held[0]:
            copied, grown = copied + held[1], grown + 1
        held = places, sum(segment.k.shape[2] for segment in segments.values())
    return cache, copied, grown


@pytest.mark.parametrize(("tokens", "most"), [(100, 6), (1000, 25), (30_000, 54)])
def test_many_decoded_tokens_copy_the_cache_seldom(tokens, most):
    _, copied, grown = written(patched_tiny("retrieval", layers=1), tokens)
    assert grown <= most, "by an eighth, by 16 slots at first"
    assert copied <= 9 * tokens


def test_a_streaming_ring_and_its_history_are_made_as_they_fill():
    model = patched_tiny("streaming", sink=64, recent=256, layers=1)
    for rollback in (False, True):
        cache, sizes = LongCtxCache(model, rollback=rollback), {}
        for at in range(1, 800):
            cache.update(*(torch.zeros(1, 4, 1, 8) for _ in "kv"), 0)
            sizes[at] = {name: segment.k.shape[2] for name, segment in cache.layers[0].stores[0].segments.items()}
        assert sizes[1] == {"kept": 17} and sizes[17] == {"kept": 17} and sizes[18] == {"kept": 34}
        assert sizes[320] == {"kept": 320}
        history = {at: size.get("history", 0) for at, size in sizes.items()}
        if not rollback:
            assert set(history.values()) == {0} and sizes[799] == {"kept": 320}
            continue
        assert (history[320], history[321], history[337], history[338]) == (0, 18, 18, 35)
        assert all(history[at] > min(255, at - 320) for at in range(321, 800)), "what left the ring has a slot"
        assert history[574] == history[799] == 256
        assert len(set(history.values())) == 15, "14 times, by 17 slots at first"


def test_max_tokens_never_allocates_the_cache_again():
    model = patched_tiny(recent=64)
    cache = LongCtxCache(model, max_tokens=1400)
    read(model, cache, torch.randint(3, 97, (1, 390)))
    held = [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors()]
    for _ in range(1000):
        read(model, cache, torch.randint(3, 97, (1, 1)))
    assert [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors()] == held


@pytest.mark.parametrize("padded", [False, True])
def test_device_reads_of_a_decode_step_do_not_grow_with_the_layers(padded):
    counts = []
    for layers in (2, 6):
        model = patched_tiny(layers=layers)
        cache = LongCtxCache(model)
        ids, mask = left_padded([60, 9] if padded else [60, 60])
        read(model, cache, ids, mask)
        with CountReads() as count:
            read(model, cache, ids[:, :1], torch.cat([mask, mask[:, -1:]], 1))
        counts.append(count.reads)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("lengths", [[1500], [1500, 1500], [1500, 400]])
@pytest.mark.parametrize("chunk", [1500, 700])
def test_no_mask_of_a_forward_is_larger_than_512_rows(lengths, chunk, monkeypatch):
    model = patched_tiny(sink=16, recent=64)
    largest = []
    sdpa = cpu.scaled_dot_product_attention

    def watch(*args, attn_mask=None, **kwargs):
        largest.append(0 if attn_mask is None else attn_mask.numel())
        return sdpa(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(cpu, "scaled_dot_product_attention", watch)
    ids, mask = left_padded(lengths)
    cache = LongCtxCache(model)
    for at in range(0, 1500, chunk):
        read(model, cache, ids[:, at : at + chunk], mask[:, : at + chunk])
    assert 0 < max(largest) <= 512 * 1500


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_half_streaming_keeps_at_most_six_tenths_after_16k_tokens(batch):
    model = tiny_model("llama", layers=2)
    roles = ["RSRS", "SSRR"]
    patch_model(model, config_for(model, roles, 64, 256))
    ids = torch.randint(3, 97, (batch, 16384))
    empty = live_bytes()
    with torch.no_grad():
        cache = model(ids, logits_to_keep=1).past_key_values
        for _ in range(2):
            held = live_bytes() - empty
            assert cache.nbytes <= 0.60 * cache.nbytes_dense
            assert 0.999 * cache.nbytes <= held - cache.token_ids.nbytes <= cache.nbytes + 100_000
            model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
    assert cache.nbytes_dense == 2 * 2 * 4 * 8 * 4 * batch * 16386
