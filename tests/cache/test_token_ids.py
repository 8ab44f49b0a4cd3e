"""``cache.ids`` are the ids of every token seen, whatever happens to the cache, or None."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from helpers.caches import patched_tiny, read
from helpers.device_reads import CountReads
from helpers.tiny import left_padded

from hf_longctx import CacheError, LongCtxCache
from hf_longctx.cache.token_ids import SPARE, TokenIds


@pytest.mark.parametrize("max_tokens", [None, 500])
def test_random_steps_rollbacks_and_rows(max_tokens):
    model, rng, cases = patched_tiny(recent=40), random.Random(3), []
    cache = LongCtxCache(model, max_tokens=max_tokens)
    ids, mask = left_padded([90, 40, 3])
    read(model, cache, ids, mask)
    for _ in range(60):
        case = rng.choice(["token", "chunk", "crop", "reorder", "repeat", "select", "fork", "copy", "pickle"])
        cases.append(case)
        if case in ("token", "chunk"):
            new = torch.randint(3, 97, (len(ids), 1 if case == "token" else 9))
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
            read(model, cache, new, mask)
        elif case == "crop":
            back = rng.randint(1, 8)
            cache.crop(-back)
            ids, mask = ids[:, :-back], mask[:, :-back]
        elif case in ("reorder", "repeat", "select"):
            rows = {
                "reorder": torch.randint(len(ids), (len(ids),)),
                "repeat": torch.arange(len(ids)).repeat_interleave(2),
                "select": torch.randperm(len(ids))[:2],
            }[case]
            if case == "repeat":
                cache.batch_repeat_interleave(2)
            else:
                (cache.reorder_cache if case == "reorder" else cache.batch_select_indices)(rows)
            ids, mask = ids[rows], mask[rows]
        elif case == "fork":
            fork = cache.fork()
            read(model, fork, torch.full((len(ids), 3), 5), torch.cat([mask, mask.new_ones(len(ids), 3)], 1))
            assert fork.ids.shape[1] == cache.ids.shape[1] + 3 and torch.equal(fork.ids[:, :-3], ids)
        else:
            cache = copy.deepcopy(cache) if case == "copy" else pickle.loads(pickle.dumps(cache))
        assert torch.equal(cache.ids, ids) and cache.ids.dtype == torch.long
    assert len(set(cases)) == 9
    cache.reset()
    assert cache.ids is None and cache.token_ids.nbytes == 0
    assert read(model, cache, ids[:1]) is not None and torch.equal(cache.ids, ids[:1])


def test_ids_that_were_not_given_end_what_is_known():
    model, ids = patched_tiny(), torch.randint(3, 97, (1, 20))
    cache = LongCtxCache(model)
    assert cache.ids is None
    read(model, cache, ids)
    for layer in range(3):
        cache.update(torch.randn(1, 4, 2, 8).double(), torch.randn(1, 4, 2, 8).double(), layer)
    assert cache.ids is None
    read(model, cache, ids[:, :1])
    assert cache.ids is None, "those of later tokens do not help"
    cache.crop(-3)
    assert torch.equal(cache.ids, ids)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
    assert (cache.seen, cache.ids) == (40, None)


def test_a_forward_that_failed_leaves_no_ids():
    model, ids = patched_tiny(), torch.randint(3, 97, (2, 20))
    cache = LongCtxCache(model)

    def fails(*args):
        raise KeyboardInterrupt

    for where in (0, 2):
        hook = model.base_model.layers[where].self_attn.register_forward_pre_hook(fails)
        with pytest.raises(KeyboardInterrupt):
            read(model, cache, ids)
        hook.remove()
        if where:
            with pytest.raises(CacheError, match="interrupted"):
                read(model, cache, ids)
            cache.crop(0)
        assert cache.seen == 0 and cache.ids is None
    hook = model.base_model.layers[0].self_attn.register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        read(model, cache, torch.randint(3, 97, (2, 30)))
    hook.remove()
    for layer in range(3):  # as many rows, fewer tokens than the forward that failed
        cache.update(torch.randn(2, 4, 5, 8).double(), torch.randn(2, 4, 5, 8).double(), layer)
    assert (cache.seen, cache.ids) == (5, None)
    cache.reset()
    read(model, cache, ids[:1])
    assert torch.equal(cache.ids, ids[:1])


def test_nothing_reads_the_device_and_little_is_copied():
    ids, kept = TokenIds(), []
    with CountReads() as count:
        for step in range(3000):
            ids.append(step, torch.full((2, 1), step))
            kept.append(ids.buffer.data_ptr())
        ids.crop(2990)
        ids.fork().append(2990, torch.zeros(2, 4, dtype=torch.long))
    assert count.reads == 0
    assert sum(a != b for a, b in zip(kept, kept[1:], strict=False)) == 2
    assert ids.nbytes <= 2 * 4 * (3000 + SPARE) and torch.equal(ids.known(2990)[1], torch.arange(2990))
    assert ids.known(2991) is None


def test_staggered_rows_have_pads_before_their_ids():
    ids = TokenIds()
    ids.append(0, torch.arange(1, 7).expand(3, -1))
    ids.stagger([0, 2, 5])
    want = [[1, 2, 3, 4, 5, 6], [0, 0, 1, 2, 3, 4], [0, 0, 0, 0, 0, 1]]
    assert ids.known(6).tolist() == want
    ids.append(6, torch.tensor([[7], [8], [9]]))
    assert ids.known(7)[:, -1].tolist() == [7, 8, 9]
