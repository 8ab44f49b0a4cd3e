"""Evictions where something is odd: sequences that begin late, short prompts, halves, inference mode, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.evicting import BY, evicting, read, some
from helpers.tiny import left_padded, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from hf_longctx import LongCtxCache, report
from hf_longctx.eviction._budgets import by_head, by_model, pyramid, uniform

RULES = {
    "keys": {"score": "key_norm"},
    "last queries": {"score": "snapkv", "window": 8},
    "all queries": {"score": "observed"},
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
bys = pytest.mark.parametrize("by", BY)


@torch.no_grad()
def pieces(model, ids, mask, sizes, cache=None):
    """Logits after each piece of a left-padded batch, ``[len(sizes), B, V]``, and the cache."""
    cache, found, at = cache or LongCtxCache(model), [], 0
    for size in sizes:
        seen = mask[:, : at + size]
        step = {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)[:, at:]}
        found.append(model(ids[:, at : at + size], past_key_values=cache, **step).logits[:, -1])
        at += size
    return torch.stack(found), cache


@pytest.mark.spanning
@rules
@bys
def test_sequences_that_begin_after_whole_pieces_of_pads(rule, by):
    """One of them with a single token in its prompt."""
    model = evicting(rule=rule, by=by, budget={"share": 0.4})
    ids, mask = left_padded([80, 10, 1])
    ids = torch.cat([ids, some(3, 6, seed=2)], 1)
    mask = torch.cat([mask, mask.new_ones(3, 6)], 1)
    got, cache = pieces(model, ids, mask, [20] * 4 + [1] * 6)
    for row, own in enumerate(mask.bool()):
        count = int(own.sum())
        alone, _ = pieces(model, ids[row, own][None], mask.new_ones(1, count), [count - 6] + [1] * 6)
        torch.testing.assert_close(got[-6:, row], alone[1:, 0], rtol=0, atol=1e-9)
    assert cache.own[0].evicting[0].cut.slots == 80


@pytest.mark.spanning
@rules
@bys
def test_tokens_leave_before_a_sequence_begins(rule, by):
    """By ``every``, at the same tokens of a sequence that is alone and has no pads."""
    model = evicting(rule=rule, by=by, budget={"share": 0.4}, every=16)
    ids, mask = left_padded([80, 10])
    ids = torch.cat([ids, some(2, 30, seed=2)], 1)
    mask = torch.cat([mask, mask.new_ones(2, 30)], 1)
    got, cache = pieces(model, ids, mask, [20] * 4 + [1] * 30)
    alone, _ = pieces(model, ids[:1], mask[:1], [20] * 4 + [1] * 30)
    torch.testing.assert_close(got[:, 0], alone[:, 0], rtol=0, atol=1e-9)
    assert got.isfinite().all()
    cache = cache.fork()
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices([1])
    more = torch.cat([ids[:1], some(1, 1)], 1), torch.cat([mask[:1], mask.new_ones(1, 1)], 1)
    step = {"attention_mask": more[1], "position_ids": torch.tensor([[110]]), "past_key_values": cache}
    want, _ = pieces(model, *more, [20] * 4 + [1] * 31)
    with torch.no_grad():
        torch.testing.assert_close(model(some(1, 1), **step).logits[0, -1], want[-1, 0], rtol=0, atol=1e-9)


@pytest.mark.spanning
@rules
@bys
@pytest.mark.parametrize("length", [1, 3, 5, 12])
def test_prompts_shorter_than_what_is_protected_stay_whole(rule, by, length):
    model = evicting(rule=rule, by=by, budget={"share": 0.1})
    dense = evicting(rule=rule, by=by, budget={"share": 1.0})
    dense.load_state_dict(model.state_dict())
    ids, mask = some(1, length + 3), torch.ones(1, length + 3, dtype=torch.long)
    sizes = [length, 1, 1, 1]
    assert torch.equal(pieces(model, ids, mask, sizes)[0], pieces(dense, ids, mask, sizes)[0])


@rules
@bys
def test_right_pads_are_read_and_nothing_leaves(rule, by):
    model = evicting(rule=rule, by=by, budget={"share": 0.4})
    ids, mask = some(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, 20:] = 0
    cache = LongCtxCache(model)
    with torch.no_grad():
        got = model(ids, attention_mask=mask, past_key_values=cache).logits[1, :20]
        torch.testing.assert_close(got, model(ids[1:, :20]).logits[0], rtol=0, atol=1e-12)
    before = cache.nbytes
    cache.evict()
    assert cache.nbytes == before


@pytest.mark.spanning
@rules
@bys
def test_halves_one_query_head_per_kv_head_and_inference_mode(rule, by):
    for model in (tiny_model("llama", torch.bfloat16), tiny_model("llama", torch.float64, group=1)):
        evicting(rule=rule, by=by, budget={"share": 0.4}, model=model)
        for steps in (0, 1):
            with torch.inference_mode():
                cache = LongCtxCache(model)
                model(some(1, 100), past_key_values=cache)
                for _ in range(steps):
                    model(some(1, 1), past_key_values=cache)
            want = read(model, some(100))
            read(model, some(3 + steps, seed=1), want, chunk=1)
            read(model, some(3 + steps, seed=1)[steps:], cache, chunk=1)
            assert cache.seen == want.seen and cache.nbytes == want.nbytes


@pytest.mark.spanning
@rules
@bys
def test_threads_fork_one_cache(rule, by):
    model = evicting(rule=rule, by=by, budget={"share": 0.4})
    for steps in (0, 2):
        cache = read(model, some(100))
        read(model, some(steps), cache, chunk=1) if steps else None

        def answer(seed, cache=cache):
            own = cache.fork()
            with torch.no_grad():
                return torch.cat([model(one[None, None], past_key_values=own).logits[0] for one in some(6, seed=seed)])

        want = [answer(seed) for seed in range(8)]
        with ThreadPoolExecutor(4) as pool:
            for got, one in zip(pool.map(answer, range(8)), want, strict=True):
                torch.testing.assert_close(got, one, rtol=0, atol=1e-12)
        assert not torch.allclose(want[0], want[1])


def test_of_equal_scores_the_first_are_kept():
    same = [torch.zeros(10), torch.zeros(10)]
    first = torch.arange(10) < 3
    assert all(torch.equal(one, first) for one in uniform(same, 3))
    assert [int(one.sum()) for one in by_head(same, 3, 0.0)] == [6, 0]
    assert [int(one.sum()) for one in by_head(same, 3, 0.5)] == [5, 1]
    assert [[int(one.sum()) for one in heads] for heads in by_model([same, same], 4, 0.0)] == [[10, 6], [0, 0]]
    assert all(torch.equal(one, torch.arange(10) < one.sum()) for one in by_head(same, 3, 0.5))
    for budget in (20, 33, 57):
        assert sum(pyramid(budget, 12, 100, 7)) == 7 * budget


@torch.no_grad()
def test_every_holds_where_the_first_layer_evicts_nothing():
    """Its heads stream, or it has a window of its own."""
    streaming = evicting(roles=["SSSS", "RRRR", "RRRR"], budget={"tokens": 40}, every=20)
    config = tiny_config("qwen2", sliding=20)
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    windowed = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa").eval()
    for model in (streaming, evicting(model=windowed, budget={"tokens": 40}, every=20)):
        cache = read(model, some(60))
        for token in some(50).split(1):
            model(token[None], past_key_values=cache)
        assert cache.own[1].stores[0].cut.slots > 80
        assert report(model).evictions > 2
