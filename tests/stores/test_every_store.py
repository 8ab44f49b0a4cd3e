"""Every mode of generate and every way to handle a cache, over every store that the folder lists."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.caches import read
from helpers.device_reads import CountReads
from helpers.generation import MODES, NEW, prompt, run
from helpers.store_cases import BY_DATA, CASES, PAGED_SLOWLY, ROUNDED, SPECS, case_config, patched_case, role_of
from helpers.tiny import left_padded, tiny_model
from transformers import DynamicCache

from hf_longctx import CacheError, LongCtxCache, patch_model
from hf_longctx.config.words import words

EXACT = [case for case in CASES if case not in ROUNDED]
WITH_CACHE = [mode for mode in MODES if mode != "no cache"]
SAME_AS_GREEDY = {"prompt lookup", "chunks"}


def test_every_store_is_here():
    assert {given["store"] for given in CASES.values()} == set(words("stores"))
    assert {"full", "sink_recent"} < set(CASES), "a store with one case is called by its word"
    assert {role_of(case) for case in CASES} == {"retrieval", "streaming"} and EXACT and ROUNDED


@pytest.mark.spanning
@pytest.mark.parametrize("mode", WITH_CACHE)
@pytest.mark.parametrize("case", EXACT)
def test_every_mode_gives_the_tokens_of_the_whole_sequence_read_anew(case, mode):
    """Without a cache the same rule is applied to plain keys and values, at every token again."""
    model = tiny_model("llama", torch.float64)
    dense = run(model, mode)
    patch_model(model, case_config(model, case, role_of(case)))
    if mode in SAME_AS_GREEDY:
        want = model.generate(**prompt(mode), max_new_tokens=NEW, use_cache=False)
    else:
        want = run(model, mode, use_cache=False)
    got = run(model, mode)
    assert torch.equal(got, want)
    assert torch.equal(got, dense) == (role_of(case) == "retrieval"), "a streaming rule changes something"


@pytest.mark.spanning
@pytest.mark.parametrize("mode", ["greedy", "chunks", "beams"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("case", CASES)
def test_a_padded_batch_equals_its_rows_alone(case, family, mode):
    model = patched_case(case, torch.float64, family=family)
    batch = prompt("greedy")
    asked = {"max_new_tokens": NEW, **MODES[mode]}
    together = model.generate(**batch, **asked)
    for row, mask in enumerate(batch["attention_mask"].bool()):
        # Chunks are cut at slots, so the rows alone are given their pads; rounded keys depend on the cuts.
        own = slice(None) if mode == "chunks" and case in ROUNDED else mask
        alone = {name: x[row][own][None] for name, x in batch.items()}
        assert torch.equal(together[row][-NEW:], model.generate(**alone, **asked)[0, -NEW:])


@pytest.mark.spanning
@pytest.mark.parametrize("lookup", [3, 9])
@pytest.mark.parametrize("case", CASES)
def test_rejected_drafts_change_nothing(case, lookup):
    model = patched_case(case, torch.float64)
    asked = {**prompt("prompt lookup"), "max_new_tokens": 40, "eos_token_id": -1}
    drafted = model.generate(**asked, prompt_lookup_num_tokens=lookup)
    assert torch.equal(drafted, model.generate(**asked))


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("case", EXACT)
def test_many_turns_and_caches_of_the_user_give_the_tokens_of_one_text(case, family):
    """Also where every layer has the model's own window, which replaces both stores (mistral)."""
    model = tiny_model(family, torch.float64, sliding=13 if family == "mistral" else None)
    patch_model(model, case_config(model, case))
    text, cache = prompt("greedy")["input_ids"][:1], None
    for turn in range(3):
        fresh = model.generate(input_ids=text, max_new_tokens=5, use_cache=False)
        out = model.generate(input_ids=text, max_new_tokens=5, past_key_values=cache, return_dict_in_generate=True)
        assert torch.equal(out.sequences, fresh)
        cache = out.past_key_values
        assert isinstance(cache, LongCtxCache)
        for other in (DynamicCache(), LongCtxCache(model, max_tokens=80)):
            assert torch.equal(model.generate(input_ids=text, max_new_tokens=5, past_key_values=other), fresh)
        text = torch.cat([fresh, torch.full((1, 3 + turn), 7 + turn)], 1)


@pytest.mark.parametrize("case", [case for case in CASES if case not in BY_DATA])
def test_training_sees_what_the_store_s_rule_shows(case):
    """No cache in training: gradients of the same rule by autograd's own reading of a prompt with a cache."""
    model = tiny_model("llama", torch.float64)
    ids, mask = left_padded([60, 23])

    def gradient():
        model.zero_grad()
        logits = model(ids, attention_mask=mask).logits
        logits[:, -20:].square().sum().backward()
        return model.base_model.layers[0].self_attn.k_proj.weight.grad.clone()

    dense = gradient()
    patch_model(model, case_config(model, case, role_of(case)))
    with_cache = gradient()
    model.train()
    torch.testing.assert_close(gradient(), with_cache, rtol=0, atol=1e-8)
    same = torch.allclose(with_cache, dense, rtol=0, atol=1e-8)
    assert same == (role_of(case) == "retrieval"), "a prompt read at once is read as it is by retrieval heads only"


@pytest.mark.spanning
@pytest.mark.parametrize("max_tokens", [None, 400])
@pytest.mark.parametrize("length", [1, 31, 200])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_copies_forks_pickles_and_rows_go_on_alike(case, length, max_tokens):
    model = patched_case(case, torch.float64)
    ids, mask = left_padded([length, max(1, length // 3), max(1, length - 2)])
    cache = LongCtxCache(model, max_tokens=max_tokens)
    read(model, cache, ids, mask)
    steps = torch.randint(3, 97, (3, 25))

    def go_on(cache, rows, steps=steps):
        """Logits after each of 5 tokens, a chunk of 17, and 3 more tokens."""
        outs, at = [], length
        for size in (1, 1, 1, 1, 1, 17, 1, 1, 1):
            new = steps[rows, at - length : at - length + size]
            seen = torch.cat([mask[rows], torch.ones(len(rows), at - length + size, dtype=mask.dtype)], 1)
            outs.append(read(model, cache, new, seen))
            at += size
        return torch.stack(outs)

    rows = torch.arange(3)
    one, two = cache.fork(), copy.deepcopy(cache)
    three = pickle.loads(pickle.dumps(cache))
    want = go_on(cache, rows)
    assert want.isfinite().all()
    for other in (one.fork(), one, two, three):
        torch.testing.assert_close(go_on(other, rows), want, rtol=0, atol=1e-12)
    other = go_on(_fresh(model, ids, mask, max_tokens), rows, steps.flip(1))
    assert not torch.allclose(other, want, atol=1e-3)

    order = torch.tensor([2, 0, 0])
    for change, kept in (
        (lambda cache: cache.reorder_cache(order), order),
        (lambda cache: cache.batch_repeat_interleave(2), rows.repeat_interleave(2)),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), torch.tensor([1])),
    ):
        changed = _fresh(model, ids, mask, max_tokens).fork()
        change(changed)
        torch.testing.assert_close(go_on(changed, kept), want[:, kept], rtol=0, atol=1e-12)


def _fresh(model, ids, mask, max_tokens=None) -> LongCtxCache:
    cache = LongCtxCache(model, max_tokens=max_tokens)
    read(model, cache, ids, mask)
    return cache


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_reset_and_crop_to_nothing_free_the_memory(case):
    model = patched_case(case, torch.float64)
    ids = torch.randint(3, 97, (2, 150))
    cache = LongCtxCache(model)
    want = read(model, cache, ids)
    assert cache.nbytes > 0
    for empty in (cache.reset, lambda: cache.crop(-150)):
        empty()
        assert (cache.nbytes, cache.seen, cache.batch_size) == (0, 0, -1)
        assert torch.equal(read(model, cache, ids), want)


@pytest.mark.parametrize("case", PAGED_SLOWLY)
@torch.no_grad()
def test_max_tokens_never_allocates_again(case):
    model = patched_case(case, torch.float32)
    cache = LongCtxCache(model, max_tokens=600)
    read(model, cache, torch.randint(3, 97, (1, 390)))
    read(model, cache, torch.randint(3, 97, (1, 1)))  # where a prompt ends, a store may move what it keeps of it
    held = _places(cache)
    for _ in range(199):
        read(model, cache, torch.randint(3, 97, (1, 1)))
    assert _places(cache) == held
    with pytest.raises(CacheError, match="max_tokens=600"):
        read(model, cache, torch.randint(3, 97, (1, 20)))


def _places(cache) -> set[int]:
    """Where the cache's memory is; pages outside of the device are made as they fill."""
    stores = [store for layer in cache.layers for store in layer.stores]
    segments = [segment for store in stores for segment in store.segments.values() if hasattr(segment, "entries")]
    paged = {id(tensor) for segment in segments for tensor in segment.tensors()}
    return {tensor.data_ptr() for store in stores for tensor in store.tensors() if id(tensor) not in paged}


@pytest.mark.spanning
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if not SPECS[case].places])  # those read files
def test_device_reads_of_a_decode_step_do_not_grow_with_the_layers(case, padded):
    counts = []
    for layers in (2, 6):
        model = patched_case(case, torch.float64, layers=layers)
        ids, mask = left_padded([60, 9] if padded else [60, 60])
        cache = _fresh(model, ids, mask)
        for _ in range(2):  # the first one may end a prompt
            mask = torch.cat([mask, mask[:, -1:]], 1)
            with CountReads() as count:
                read(model, cache, ids[:, :1], mask)
        counts.append(count.reads)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_bad_input_leaves_the_cache_as_it_was(case):
    model = patched_case(case, torch.float32)
    ids = torch.randint(3, 97, (2, 70))
    cache = _fresh(model, ids, None)
    want = read(model, copy.deepcopy(cache), ids[:, :1])
    layer = cache.layers[0]
    keys = torch.randn(2, 4, 1, 8)
    for match, bad in (
        ("no tokens", lambda: model(ids[:, :0], past_key_values=cache)),
        ("0 tokens", lambda: cache.update(keys[:, :, :0], keys[:, :, :0], 0)),
        ("holds 2 rows, the forward brings 1", lambda: model(ids[:1, :1], past_key_values=cache)),
        ("1 rows", lambda: cache.update(keys[:1], keys[:1], 0)),
        ("bfloat16", lambda: cache.update(keys.bfloat16(), keys.bfloat16(), 0)),
        ("on meta", lambda: cache.update(keys.to("meta"), keys.to("meta"), 0)),
        ("bfloat16", lambda: model.bfloat16()(ids[:, :1], past_key_values=cache)),
    ):
        with pytest.raises(CacheError, match=match):
            bad()
        assert (layer.seen, layer.whole, cache.seen) == (70, True, 70)
    model = model.float()
    again = patched_case(case, torch.float32)
    again.load_state_dict(model.state_dict())
    assert torch.allclose(read(again, cache, ids[:, :1]), want, atol=0.3)
