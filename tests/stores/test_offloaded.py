"""``store: offloaded``, and what it shares with ``offloaded_disk``: every mode equals ``store: full``."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
from dataclasses import replace

import pytest
import torch
from helpers.device_reads import CountReads
from helpers.paged_cases import WORDS, full_model, paged_config, paged_model, paged_stores, pages_of, read
from helpers.tiny import SLIDING, left_padded, tiny_model
from torch.utils._python_dispatch import _disable_current_modes

from hf_longctx import LongCtxCache, patch_model, report
from hf_longctx.layout.segments import HeadKV
from hf_longctx.stores import _page, _pages
from hf_longctx.stores.base import Reserve

LENGTHS = {"one": [150], "three": [131] * 3, "padded": [150, 97, 3], "short and long": [150, 20]}
CHUNKS = {"one shot": [150], "odd": [7, 1, 60, 2, 33, 47], "sixteens": [16] * 9 + [6], "long second": [18, 132]}


def test_the_words_tested_here_are_those_of_the_folder():
    assert {"offloaded", "offloaded_disk"} <= set(WORDS)


# Every attention call against the dense mask, in float64.


def shadowed(shadow, word, lengths, chunks, family="llama", page=16, recent=20, decoded=25, kernel="auto", **kwargs):
    model = tiny_model(family, torch.float64, **kwargs)
    config = paged_config(model, word, page, recent, roles="mixed", kernel=kernel)
    patch_model(model, config)
    watch = shadow(config)
    ids, mask = left_padded([length + decoded for length in lengths])
    total = ids.shape[1] - decoded
    cuts = [min(count, total - sum(chunks[:i])) for i, count in enumerate(chunks)]
    cache, done = LongCtxCache(model), 0
    with torch.no_grad():
        for count in [cut for cut in cuts if cut > 0] + [1] * decoded:
            done += count
            padded = mask[:, :done] if len(set(lengths)) > 1 else None
            model(ids[:, done - count : done], attention_mask=padded, past_key_values=cache)
    assert watch.calls and cache.get_seq_length() == total + decoded
    for store in paged_stores(cache):
        assert store.paged == max(0, total + decoded - recent) // page * page
    return watch, cache


@pytest.mark.spanning
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_attention_equals_the_dense_mask(word, lengths, chunks, shadow):
    watch, cache = shadowed(shadow, word, lengths, chunks)
    assert watch.error <= 1e-12
    assert min(len(pages) for pages in pages_of(cache)) >= 8


@pytest.mark.spanning
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(
    ("page", "recent", "kernel"),
    [(16, 0, "auto"), (17, 1, "reference"), (64, 3, "auto"), (16, 100, "stock"), (200, 0, "auto")],
)
def test_any_page_and_window(word, page, recent, kernel, shadow):
    watch, _ = shadowed(shadow, word, LENGTHS["padded"], CHUNKS["odd"], page=page, recent=recent, kernel=kernel)
    assert watch.error <= 1e-12


@pytest.mark.parametrize("family", SLIDING)
def test_other_families_and_windows_of_the_model_s_own(family, shadow):
    watch, cache = shadowed(shadow, "offloaded", [90, 60], CHUNKS["odd"], family, sliding=None)
    assert watch.error <= 1e-12
    if family != "qwen3":
        sliding = tiny_model(family, torch.float64, sliding=8)
        patch_model(sliding, paged_config(sliding, "offloaded"))
        assert sum(map(bool, paged_stores(LongCtxCache(sliding)))) == (0 if family == "mistral" else 2)


@pytest.mark.parametrize("wrong", ["page dropped", "pads seen", "page twice"])
def test_a_wrong_page_is_seen(wrong, shadow, monkeypatch):
    blocks = _pages.Pages.blocks

    def broken(self):
        for at, block in enumerate(blocks(self)):
            if wrong == "pads seen":
                block = replace(block, bias=None)
            if not (wrong == "page dropped" and at == 3):
                yield block
            if wrong == "page twice" and at == 3:
                yield block

    monkeypatch.setattr(_pages.Pages, "blocks", broken)
    watch, _ = shadowed(shadow, "offloaded", LENGTHS["padded"], CHUNKS["odd"])
    assert watch.error > 1e-4


def test_pads_are_cut_from_pages_in_a_chunk(shadow, monkeypatch):
    """The control of the padded cases: left in, the pads are read."""
    monkeypatch.setattr(_pages.PagedKV, "alone", lambda self, rows, start: HeadKV.alone(self, rows, 0))
    monkeypatch.setattr(_pages.Pages, "k", property(lambda self: self.contents()[0]), raising=False)
    monkeypatch.setattr(_pages.Pages, "v", property(lambda self: self.contents()[1]), raising=False)
    watch, _ = shadowed(shadow, "offloaded", LENGTHS["padded"], CHUNKS["odd"])
    assert watch.error > 1e-4


# Rollback, rows, copies.


@pytest.mark.spanning
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("lengths", [[200], [200, 200], [200, 80, 9]])
def test_random_steps_and_deep_rollbacks_equal_a_fresh_reading(word, lengths):
    model, plain, rng = paged_model(word), full_model(), random.Random(len(lengths))
    ids, mask = left_padded([length + 150 for length in lengths])
    padded = len(set(lengths)) > 1
    cache, at, deepest = LongCtxCache(model), max(lengths), 0
    read(model, cache, ids[:, :at], mask[:, :at] if padded else None)
    for _ in range(25):
        if rng.random() < 0.45:
            back = rng.choice([1, 5, 15, 30, 90])
            if at - back > 20:
                deepest = max(deepest, paged_stores(cache)[0].paged - (at - back))
                before = [page for pages in pages_of(cache) for page in pages]
                cache.crop(-back)
                assert all(any(page is old for old in before) for pages in pages_of(cache) for page in pages)
                at -= back
        step = rng.choice([1, 1, 2, 5, 17, 40])
        step = min(step, ids.shape[1] - at)
        if not step:
            continue
        got = read(model, cache, ids[:, at : at + step], mask[:, : at + step] if padded else None)
        at += step
        assert cache.get_seq_length() == at
        want = read(plain, LongCtxCache(plain), ids[:, :at], mask[:, :at] if padded else None)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert deepest > 32, "no crop went deep into the pages"


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("max_tokens", [None, 200])
def test_beams_copies_and_pickles(word, max_tokens):
    model, plain = paged_model(word, roles="mixed"), full_model(roles="mixed")
    ids, mask = left_padded([120, 9, 70])
    ones = torch.ones(3, 1, dtype=mask.dtype)
    cache, reference = LongCtxCache(model, max_tokens=max_tokens), LongCtxCache(plain)
    for one, it in ((model, cache), (plain, reference)):
        read(one, it, ids, mask)
    step = torch.tensor([[5], [6], [7]])
    want = read(plain, reference, step, torch.cat([mask, ones], 1))

    order = torch.tensor([2, 0, 0])
    beams = copy.deepcopy(cache)
    assert all(a is b for x, y in zip(pages_of(beams), pages_of(cache), strict=True) for a, b in zip(x, y, strict=True))
    beams.reorder_cache(order)
    got = read(model, beams, step[order], torch.cat([mask[order], ones], 1))
    torch.testing.assert_close(got, want[order], rtol=0, atol=1e-6)
    assert (got - want).abs().max() > 1e-3, "a control: the order matters"

    doubled = pickle.loads(pickle.dumps(cache))
    assert doubled.nbytes == cache.nbytes and doubled.nbytes_offloaded == cache.nbytes_offloaded
    doubled.batch_repeat_interleave(2)
    each = torch.arange(3).repeat_interleave(2)
    got = read(model, doubled, step[each], torch.cat([mask[each], ones[each]], 1))
    torch.testing.assert_close(got, want[each], rtol=0, atol=1e-6)

    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    chosen = torch.load(buffer, weights_only=False)
    chosen.batch_select_indices(torch.tensor([1]))
    got = read(model, chosen, step[1:2], torch.cat([mask[1:2], ones[1:2]], 1))
    torch.testing.assert_close(got, want[1:2], rtol=0, atol=1e-6)
    assert (chosen.batch_size, doubled.batch_size, cache.batch_size) == (1, 6, 3)


@pytest.mark.parametrize("word", WORDS)
def test_beams_that_change_rows_again_and_again_rewrite_no_page(word):
    """Pages of several times, each with its own index: written by 2 rows, by 6 reordered ones, and by 3 of those."""
    model, plain = paged_model(word), full_model()
    ids = torch.randint(3, 97, (2, 70))
    cache, reference = LongCtxCache(model), LongCtxCache(plain)
    both = ((model, cache), (plain, reference))
    changes = [
        lambda it: it.batch_repeat_interleave(3),
        lambda it: it.reorder_cache(torch.tensor([5, 0, 2, 3, 3, 1])),
        lambda it: it.reorder_cache(torch.arange(6)),
        lambda it: it.batch_select_indices(torch.tensor([4, 0, 1])),
    ]
    for one, it in both:
        read(one, it, ids)
    known = {}
    for change in changes:
        known |= {id(page): page for pages in pages_of(cache) for page in pages}
        for _, it in both:
            change(it)
        assert {id(page) for pages in pages_of(cache) for page in pages} == set(known)
        for count in [*[1] * 20, 23]:
            more = torch.randint(3, 97, (cache.batch_size, count))
            got, want = (read(one, it, more) for one, it in both)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert {page.rows for pages in pages_of(cache) for page in pages} == {2, 6, 3}
    shared = {id(entry.index) for entry in paged_stores(cache)[0].pages.entries}
    assert len(shared) == 4, "one index for all pages of a time; none for the last"


def test_an_order_that_changes_nothing_leaves_no_index():
    model = paged_model("offloaded")
    cache = LongCtxCache(model)
    read(model, cache, torch.randint(3, 97, (3, 70)))
    for order, kept in (([1, 2, 0], True), ([2, 0, 1], False)):  # the second undoes the first
        cache.reorder_cache(torch.tensor(order))
        assert all((entry.index is not None) is kept for s in paged_stores(cache) for entry in s.pages.entries)


@pytest.mark.parametrize("word", WORDS)
def test_forks_share_pages_and_go_on_by_themselves(word):
    model, plain = paged_model(word, roles="mixed"), full_model(roles="mixed")
    ids = torch.randint(3, 97, (1, 150))
    tails = torch.randint(3, 97, (3, 60))
    base = LongCtxCache(model)
    read(model, base, ids)
    pages = pages_of(base)
    forks = [base.fork(), base.fork()]
    forks.append(forks[0].fork())
    for fork, tail in zip(forks, tails, strict=True):
        for at in range(0, 60, 20):
            got = read(model, fork, tail[None, at : at + 20])
            want = read(plain, LongCtxCache(plain), torch.cat([ids, tail[None, : at + 20]], 1))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        assert all(
            old is new for x, y in zip(pages, pages_of(fork), strict=True) for old, new in zip(x, y, strict=False)
        )
        assert all(len(x) < len(y) for x, y in zip(pages, pages_of(fork), strict=True))
    assert pages_of(base) == pages
    del base, forks[1:]
    gc.collect()
    got = read(model, forks[0], ids[:, :1])
    want = read(plain, LongCtxCache(plain), torch.cat([ids, tails[:1], ids[:, :1]], 1))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    many = forks[0].fork()
    many.batch_repeat_interleave(3)
    assert pages_of(many) == pages_of(forks[0])


@pytest.mark.parametrize("word", WORDS)
def test_generate_with_beams_and_samples_equals_the_full_store(word):
    model, plain = paged_model(word, roles="mixed"), full_model(roles="mixed")
    ids, mask = left_padded([90, 40])
    given = {"attention_mask": mask, "max_new_tokens": 30}
    ways = ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 4})
    for way in ways:
        one = 1 if "prompt_lookup_num_tokens" in way else 2
        outs = []
        for m in (model, plain):
            torch.manual_seed(5)
            pads = {} if one == 1 else given
            outs.append(m.generate(ids[:one], **(pads or {"max_new_tokens": 30}), **way))
        assert torch.equal(*outs), way


@pytest.mark.parametrize("word", WORDS)
def test_what_is_saved_is_restored(word):
    """Pages of several times, cut by a crop: as they are stored, with the index that says which row is which."""
    model = paged_model(word)
    cache = LongCtxCache(model)
    read(model, cache, torch.randint(3, 97, (2, 90)))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    read(model, cache, torch.randint(3, 97, (4, 64)))
    cache.crop(121)
    for store in paged_stores(cache):
        tensors, numbers = store.pages.saved()
        assert numbers == {"pages": 8, "0": 0, "1": 0, "2": 0, "3": 0} and all(type(n) is int for n in numbers.values())
        assert tensors["0.k"].shape[0] == 2 and tensors["index 0"].tolist() == [1, 0, 0, 1] and len(tensors) == 17
        again = store.restored("Pages", {name: x.clone() for name, x in tensors.items()}, numbers, torch.device("cpu"))
        for got, want in zip(again.contents(), store.pages.contents(), strict=True):
            assert got.shape[:3] == (4, 4, 121) and torch.equal(got, want)
        assert again.limit == store.limit and again.name == word
        assert not {id(entry.page) for entry in again.entries} & {id(entry.page) for entry in store.pages.entries}


# Memory.


@pytest.mark.spanning
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("prompt", [1, 350, 1500])
@pytest.mark.parametrize("max_tokens", [None, 4000])
def test_the_window_is_bounded_and_already_there_at_prefill(word, prompt, max_tokens):
    """Growth as of every buffer (an eighth), pages aside; with ``max_tokens`` the window is never allocated again."""
    model = paged_model(word, page=64, recent=300)
    cache = LongCtxCache(model, max_tokens=max_tokens)
    read(model, cache, torch.randint(3, 97, (1, prompt)))
    windows = [store.segments["recent"].k.data_ptr() for store in paged_stores(cache)]
    for _ in range(130):
        for store in paged_stores(cache):
            slots, tokens = store.segments["recent"].k.shape[2], store.spec.cached_tokens(cache.seen)
            assert store.segments["recent"].length == tokens < 364
            assert slots == 364 if max_tokens else slots <= tokens + max(16, tokens // 8)
            assert slots == store.spec.capacity(cache.seen, Reserve(max_tokens)) or not max_tokens
        read(model, cache, torch.randint(3, 97, (1, 1)))
    if max_tokens:
        assert [store.segments["recent"].k.data_ptr() for store in paged_stores(cache)] == windows
    assert len({len(pages) for pages in pages_of(cache)}) == 1


@pytest.mark.parametrize(("word", "place"), [("offloaded", "in host memory"), ("offloaded_disk", "on disk")])
def test_bytes_are_counted_where_they_are(word, place):
    model, slot = paged_model(word), 2 * 4 * 8 * 8
    cache = LongCtxCache(model)
    assert cache.nbytes == 0 and cache.nbytes_offloaded == {}
    read(model, cache, torch.randint(3, 97, (1, 140)))
    paged = 2 * 112 * slot
    windows = sum(s.segments["recent"].k.shape[2] for s in paged_stores(cache)) * slot
    assert cache.nbytes_offloaded == {place: paged}
    assert cache.nbytes == windows + (paged if place == "in host memory" else 0)
    assert cache.nbytes_dense == 2 * 140 * slot
    held = LongCtxCache(model)
    read(model, held, torch.randint(3, 97, (1, 140)))
    text = str(report(model))
    assert f"offloaded     {paged / 1e6:.2f} MB {place}" in text
    assert ("so its pages are in the same memory: no saving" in text) == (word == "offloaded")
    cache.reset()
    assert cache.nbytes == 0 and cache.nbytes_offloaded == {} and cache.batch_size == -1
    got, again = read(model, cache, torch.full((1, 90), 7)), read(model, LongCtxCache(model), torch.full((1, 90), 7))
    assert torch.equal(got, again)


def test_a_prompt_alone_is_noted():
    model = paged_model("offloaded")
    read(model, LongCtxCache(model), torch.randint(3, 97, (1, 60)))
    notes = report(model).notes
    assert [note for note in notes if note.endswith("no saving")] == list(notes) != []
    assert "streamed" not in report(model).kernels


def test_a_short_prompt_has_no_page_and_no_note():
    model = paged_model("offloaded")
    read(model, cache := LongCtxCache(model), torch.randint(3, 97, (1, 35)))
    assert (
        pages_of(cache) == [[], []] and "offloaded" not in str(report(model)) and "streamed" not in str(report(model))
    )
    read(model, cache, torch.randint(3, 97, (1, 1)))
    assert [len(pages) for pages in pages_of(cache)] == [1, 1]
    assert "streamed" in str(report(model))


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("lengths", [[60, 60], [60, 9]])
def test_device_reads_of_a_decode_step_do_not_grow_with_the_layers(word, lengths, monkeypatch):
    from_file, counts = _page.DiskPage.read, []

    def uncounted(page):  # safetensors reads numbers of its own, from the file
        with _disable_current_modes():
            return from_file(page)

    monkeypatch.setattr(_page.DiskPage, "read", uncounted)
    for layers in (2, 6):
        model = paged_model(word, roles="mixed", layers=layers)
        cache = LongCtxCache(model)
        ids, mask = left_padded(lengths)
        read(model, cache, ids, mask)
        with CountReads() as count:
            read(model, cache, ids[:, :1], torch.cat([mask, mask[:, -1:]], 1))
        counts.append(count.reads)
        assert min(map(len, pages_of(cache))) >= 2
    assert counts[0] == counts[1]


# Modes.


@pytest.mark.parametrize("word", WORDS)
def test_patterns_on_a_continued_prompt_read_all_pages_at_once_and_say_so(word):
    # A budget of everything reads what dense attention reads.
    prefill = {"min_tokens": 0, "retrieval": {"pattern": "vertical_slash", "vertical": 9999, "slash": 9999}}
    model, plain = paged_model(word, prefill=prefill), full_model(prefill=prefill)
    ids, mask = left_padded([700, 420])
    caches = LongCtxCache(model), LongCtxCache(plain)
    for low, high in ((0, 200), (200, 450), (450, 700)):
        got, want = (
            read(one, cache, ids[:, low:high], mask[:, :high])
            for one, cache in zip((model, plain), caches, strict=True)
        )
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        notes = [note for note in report(model).notes if "read all pages of a layer at once" in note]
        assert len(notes) == (0 if low == 0 else 1)
    assert report(model).sparse == report(plain).sparse > 0


@pytest.mark.parametrize("word", WORDS)
def test_gradients_flow_through_the_first_forward_as_with_the_full_store(word):
    grads = []
    for model in (paged_model(word, roles="mixed"), full_model(roles="mixed")):
        ids = torch.arange(3, 93)[None]
        model(ids, labels=ids, past_key_values=LongCtxCache(model)).loss.backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad)
        assert torch.isfinite(grads[-1]).all() and grads[-1].abs().sum() > 0
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("word", WORDS)
def test_a_cache_filled_in_inference_mode_and_autocast_goes_on_outside(word):
    """Autocast rounds what it computes, so the error against float32 throughout is that of the full store."""
    ids, exact, errors = torch.randint(3, 97, (1, 200)), None, []
    for make, cast in ((full_model, False), (full_model, True), (lambda **kw: paged_model(word, **kw), True)):
        model = make(dtype=torch.float32)
        cache = LongCtxCache(model)
        with torch.inference_mode():
            model(ids[:, :90], past_key_values=cache)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            read(model, cache, ids[:, 90:150])
            read(model, cache, ids[:, 150:151])
        steps = [read(model, cache, ids[:, at : at + 1]) for at in range(151, 200)]
        cache.reorder_cache(torch.tensor([0]))
        cache.crop(-120)
        steps.append(read(model, cache, ids[:, 80:]))
        exact = torch.cat(steps) if exact is None else exact
        errors.append((torch.cat(steps) - exact).abs().mean(1))
        assert {x.dtype for pages in pages_of(cache) for page in pages for x in page.read()} <= {torch.float32}
    _, full, paged = errors
    assert 0 < paged[:-1].mean() < 1.3 * full[:-1].mean(), "tokens that read what autocast wrote"
    assert max(paged[-1], full[-1]) < 1e-5, "after the rollback nothing of it is left"


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_to_float32_as_with_the_full_store(word, dtype):
    errors = []
    exact = full_model(dtype=torch.float32)
    ids = torch.randint(3, 97, (1, 300))
    want = read(exact, LongCtxCache(exact), ids)
    for make in (lambda: paged_model(word, dtype=dtype), lambda: full_model(dtype=dtype)):
        model = make()
        cache = LongCtxCache(model)
        for low, high in ((0, 100), (100, 299), (299, 300)):
            got = read(model, cache, ids[:, low:high])
        errors.append((got - want).abs().mean().item())
    assert 0 < errors[0] < 1.3 * errors[1]
