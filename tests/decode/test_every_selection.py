"""Every mode of generate and every way to handle a cache, with every selection that the folder lists."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import Counter

import pytest
import torch
from helpers.select_cases import (
    CASES,
    EVERYTHING,
    FIRST,
    RETRIEVAL,
    SELECTING,
    WORDS,
    go_on,
    index_memory,
    prompted,
    selecting,
    selections,
    spec_of,
)
from helpers.store_cases import BY_DATA, ROUNDED
from helpers.tiny import left_padded

from hf_longctx import LongCtxCache, report
from hf_longctx.cache.bytes import storage_bytes
from hf_longctx.config.words import words
from hf_longctx.decode._selection import Selection
from hf_longctx.decode.base import Select

EXACT = [store for store in RETRIEVAL if store not in ROUNDED]
OTHERS = [store for store in RETRIEVAL if store != "full"]


def case_over(store: str | None, case: str):
    """The parameters of a test; the further cases of a word are slow ones."""
    given = (case,) if store is None else (case, store)
    return pytest.param(*given, marks=() if case in FIRST else pytest.mark.slow)


EVERY = [case_over(None, case) for case in SELECTING]
# Every case over plain memory, and one of each word over the other stores; or over a store of pages and a rounded one.
PLAIN = [case_over("full", case) for case in SELECTING]
ALL_STORES = PLAIN + [(case, store) for case in FIRST for store in OTHERS]
ALSO = min(ROUNDED - BY_DATA)  # rounded, and all of it
SOME_STORES = PLAIN + [(case, store) for case in FIRST for store in ("offloaded", ALSO)]
EXACT_STORES = PLAIN + [(case, "offloaded") for case in FIRST]
PROMPT = 75
NEW = 10
LENGTHS = [75, 40, 61]


def tokens(count: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, count))


def same(got, want, atol=1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def test_every_selection_is_here():
    assert set(WORDS.values()) == set(words("decode")) and FIRST and EXACT and ROUNDED
    assert set(CASES) - set(SELECTING) == {"dense"} and "full" in EXACT


@pytest.mark.spanning("case", "store")
@pytest.mark.parametrize(("case", "store"), [*ALL_STORES, ("dense", "full")])
def test_a_budget_of_everything_equals_dense(case, store):
    ids, steps = tokens(PROMPT, 2), tokens(NEW, 2)
    dense = selecting(None, store)
    want = go_on(dense, prompted(dense, ids), steps)
    model = selecting(spec_of(case, **EVERYTHING), store)
    same(go_on(model, prompted(model, ids), steps), want, 1e-12)
    if case in SELECTING:
        assert report(model).read is None
        model = selecting(spec_of(case), store)
        assert (go_on(model, prompted(model, ids), steps) - want).abs().max() > 1e-3
        assert 0 < report(model).read < 1


@pytest.mark.parametrize(("case", "store"), ALL_STORES)
def test_choosing_everything_equals_dense(case, store, monkeypatch):
    """The way through the index and the list is taken, with a budget that leaves nothing out."""
    ids, steps = tokens(PROMPT, 2), tokens(NEW, 2)
    dense = selecting(None, store)
    want = go_on(dense, prompted(dense, ids), steps)
    spec = spec_of(case, **EVERYTHING)
    if not isinstance(spec, Select):
        pytest.skip("it says itself when it runs")
    monkeypatch.setattr(type(spec), "runs", lambda self, processed: processed > 30)
    model = selecting(spec, store)
    same(go_on(model, prompted(model, ids), steps), want, 1e-12)
    assert report(model).chosen and report(model).read == 1


@pytest.mark.spanning("case", "store")
@pytest.mark.parametrize(("case", "store"), SOME_STORES)
def test_a_padded_batch_equals_its_sequences_alone(case, store):
    model = selecting(spec_of(case), store)
    ids, mask = left_padded(LENGTHS)
    asked = {"max_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True}
    together = torch.stack(model.generate(ids, attention_mask=mask, **asked).logits, 1)
    for row, length in enumerate(LENGTHS):
        alone = torch.stack(model.generate(ids[row : row + 1, -length:], **asked).logits, 1)
        same(together[row], alone[0].to(together.dtype), 1e-5)  # logits of generate are float32


@pytest.mark.parametrize("case", FIRST)
def test_beams_of_a_padded_batch_equal_those_of_its_sequences(case):
    model = selecting(spec_of(case))
    ids, mask = left_padded(LENGTHS)
    asked = {"max_new_tokens": NEW, "num_beams": 3}
    together = model.generate(ids, attention_mask=mask, **asked)
    for row, length in enumerate(LENGTHS):
        alone = model.generate(ids[row : row + 1, -length:], **asked)
        assert torch.equal(together[row, -NEW:], alone[0, -NEW:])


@pytest.mark.parametrize("case", EVERY)
def test_a_prompt_in_chunks_equals_one_that_is_read_at_once(case):
    model = selecting(spec_of(case))
    ids, steps = tokens(300), tokens(NEW)
    want = go_on(model, prompted(model, ids), steps)
    cache = LongCtxCache(model)
    go_on(model, cache, ids, step=150)
    same(go_on(model, cache, steps), want)


@pytest.mark.spanning
@pytest.mark.parametrize("refresh", [1, 5])
@pytest.mark.parametrize("case", EVERY)
def test_assisted_decoding_gives_the_tokens_of_plain_decoding(case, refresh):
    spec = spec_of(case)
    if refresh > 1:
        spec = dataclasses.replace(spec, refresh=refresh)
    model = selecting(spec)
    ids = tokens(PROMPT)
    ids[:, 30:60] = ids[:, :30]  # lookups find drafts, most of which are rejected
    asked = {"max_new_tokens": 20, "eos_token_id": -1}
    want = model.generate(ids, **asked)
    before = report(model).forwards
    assert torch.equal(model.generate(ids, **asked, prompt_lookup_num_tokens=6), want)
    assert report(model).forwards > before


@pytest.mark.parametrize("case", FIRST)
def test_an_assistant_gives_the_tokens_of_plain_decoding(case):
    ids = tokens(PROMPT)
    helper = selecting(None, layers=1)
    model = selecting(spec_of(case))
    asked = {"max_new_tokens": NEW, "eos_token_id": -1}
    assert torch.equal(model.generate(ids, **asked, assistant_model=helper), model.generate(ids, **asked))


@pytest.mark.parametrize(("case", "store"), EXACT_STORES)
def test_several_tokens_at_once_equal_one_by_one_and_what_is_taken_back_changes_nothing(case, store):
    model = selecting(spec_of(case), store)
    ids, steps, others = tokens(PROMPT, 2), tokens(NEW, 2), tokens(20, 2)
    want = go_on(model, prompted(model, ids), steps)
    cache = prompted(model, ids)
    got = []
    for step in steps.split([1, 5, 2, 2], 1):
        got.append(go_on(model, cache, step, step=step.shape[1]))
        go_on(model, cache, others, step=20)
        cache.crop(-20)
    same(torch.cat(got, 1), want)
    assert not torch.allclose(go_on(model, prompted(model, ids), others[:, :NEW]), want, atol=1e-3)


@pytest.mark.parametrize("case", EVERY)
def test_a_token_written_and_read_in_one_call_chooses_as_the_others_do(case, monkeypatch):
    """Where a kernel has such a call: in float32, one token at a time."""
    found = []
    choose = Selection.choose

    def spy(self, group, q, cached, position, scale):
        chosen, reused = choose(self, group, q, cached, position, scale)
        blocks = chosen.blocks(position)
        found.append((position, reused, blocks.visible(0, 1).nonzero().tolist()))
        return chosen, reused

    monkeypatch.setattr(Selection, "choose", spy)
    model = selecting(spec_of(case), dtype=torch.float32, head_dim=16)
    ids, steps = tokens(PROMPT), tokens(NEW)
    outs, lists = [], []
    for step in (1, NEW):
        outs.append(go_on(model, prompted(model, ids), steps, step=step))
        lists.append(sorted(found, key=lambda one: one[0]))
        found.clear()
    assert lists[0] == lists[1]
    same(*outs, 1e-3)


@pytest.mark.spanning("case", "store")
@pytest.mark.parametrize(("case", "store"), EXACT_STORES)
def test_forks_go_on_as_independent_caches(case, store):
    model = selecting(spec_of(case), store)
    ids, first, steps = tokens(PROMPT), tokens(9), tokens(14, 2)

    def fresh():
        cache = prompted(model, ids)
        go_on(model, cache, first)
        return cache

    want = [go_on(model, fresh(), one[None]) for one in steps]
    cache = fresh()
    other = cache.fork()
    got = [go_on(model, one, step[None]) for one, step in zip((cache, other), steps, strict=True)]
    for a, b in zip(got, want, strict=True):
        same(a, b)
    third = cache.fork()
    for one, left in ((cache, 3), (other, 8)):  # both go back into what they share
        one.crop(PROMPT + left)
        again = prompted(model, ids)
        go_on(model, again, first[:, :left])
        same(go_on(model, one, steps[:1, :5]), go_on(model, again, steps[:1, :5]))
    third.crop(-1)
    same(go_on(model, third, steps[:1, -1:]), want[0][:, -1:])


@pytest.mark.parametrize("case", EVERY)
def test_forks_of_one_prompt_hold_its_index_once(case):
    model = selecting(spec_of(case))
    cache = prompted(model, tokens(800))
    go_on(model, cache, tokens(1))
    forks = [cache.fork() for _ in range(4)]
    forks[0].batch_repeat_interleave(3)
    for one in forks:
        go_on(model, one, tokens(9, max(1, one.batch_size)))
    one, every = index_memory(cache), {}
    for fork in forks:
        every |= index_memory(fork)
    assert one.keys() <= every.keys()
    assert sum(every.values()) <= 0.6 * 6 * sum(one.values()), "one prefix, and what 6 sequences added"


@pytest.mark.spanning("case", "store")
@pytest.mark.parametrize(("case", "store"), EXACT_STORES)
def test_copies_pickles_and_changed_rows_go_on_alike(case, store):
    model = selecting(spec_of(case), store)
    ids, mask = left_padded(LENGTHS)
    first, steps = tokens(5, 3), tokens(6, 3)
    mask = torch.cat([mask, torch.ones(3, 11, dtype=mask.dtype)], 1)
    for given in (mask, torch.ones_like(mask)) if case in FIRST else (mask,):
        cache = prompted(model, ids, given[:, :PROMPT])
        go_on(model, cache, first, given)
        copied, pickled = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
        changes = (
            ([2, 0, 0], lambda cache, rows: cache.reorder_cache(torch.tensor(rows))),
            ([1], lambda cache, rows: cache.batch_select_indices(torch.tensor(rows))),
            ([0, 0, 1, 1, 2, 2], lambda cache, _: cache.batch_repeat_interleave(2)),
        )
        changed = [(rows, change, copy.deepcopy(cache)) for rows, change in changes]
        want = go_on(model, cache, steps, given)
        for other in (copied, pickled):
            same(go_on(model, other, steps, given), want)
        for rows, change, other in changed:
            change(other, rows)
            same(go_on(model, other, steps[rows], given[rows]), want[rows])


@pytest.mark.spanning
@pytest.mark.parametrize("store", RETRIEVAL)
@pytest.mark.parametrize("case", FIRST)
def test_a_saved_cache_goes_on(case, store, tmp_path):
    """The index is made anew from the keys: of a quantized store from the packed ones, so choices may differ there.

    But for what is learned from queries, which are gone.
    """
    spec = spec_of(case, refresh=1, similar=None)
    model = selecting(spec, store)
    ids, steps = tokens(PROMPT, 2), tokens(NEW, 2)
    cache = prompted(model, ids)
    go_on(model, cache, steps)
    cache.save(tmp_path / "x.cache")
    loaded = LongCtxCache.load(tmp_path / "x.cache", model)
    assert bool(index_memory(loaded)) == bool(spec.saved)
    got, want = (go_on(model, one, steps) for one in (loaded, cache))
    assert got.isfinite().all()
    if store not in ROUNDED:
        same(got, want)


@pytest.mark.parametrize("case", EVERY)
def test_reserved_memory_and_a_reset_change_nothing(case):
    model = selecting(spec_of(case))
    ids, steps = tokens(PROMPT, 2), tokens(NEW, 2)
    want = go_on(model, prompted(model, ids), steps)
    cache = prompted(model, ids, max_tokens=PROMPT + NEW)
    same(go_on(model, cache, steps), want)
    for empty in (cache.reset, lambda: cache.crop(-(PROMPT + NEW))):
        empty()
        assert (cache.nbytes, cache.seen) == (0, 0)
        go_on(model, cache, ids, step=PROMPT)
        same(go_on(model, cache, steps), want)
    cache.reset()
    other = tokens(PROMPT, 1)
    go_on(model, cache, other, step=PROMPT)
    assert go_on(model, cache, steps[:1]).isfinite().all(), "another number of sequences"


@pytest.mark.parametrize("case", EVERY)
def test_the_bytes_of_a_cache_have_its_index(case):
    spec = spec_of(case)
    model = selecting(spec)
    dense = selecting(None)
    ids, steps = tokens(PROMPT, 2), tokens(NEW, 2)
    caches = [prompted(one, ids) for one in (model, dense)]
    if not spec.queries:
        assert caches[0].nbytes == caches[1].nbytes, "made at the first decoded token"
    for one, cache in zip((model, dense), caches, strict=True):
        go_on(one, cache, steps)
    more = storage_bytes(x for one in selections(caches[0]) for x in one.tensors())
    assert caches[0].nbytes - caches[1].nbytes == more
    assert sum(index_memory(caches[0]).values()) <= more
    assert bool(index_memory(caches[0])) == (spec.nbytes(PROMPT, 8, 8) > 0)


@pytest.mark.parametrize("case", EVERY)
def test_the_report_counts_what_was_chosen_and_read(case, monkeypatch):
    found = Counter()
    choose = Selection.choose

    def counted(self, group, q, cached, position, scale):
        chosen, reused = choose(self, group, q, cached, position, scale)
        batch, lists, _ = chosen.entries.shape
        found["reused" if reused else "chosen"] += batch
        visible = chosen.blocks(position).visible(0, 1)
        whole = getattr(chosen, "whole", False) and not reused  # a step that reads everything to choose
        found["read"] += visible.numel() if whole else int(visible.sum())
        found["cached"] += batch * lists * (position + 1)
        return chosen, reused

    monkeypatch.setattr(Selection, "choose", counted)
    model = selecting(spec_of(case, budget=16))
    ids, mask = left_padded([75, 60, 71])
    model.generate(ids, attention_mask=mask, max_new_tokens=NEW)
    said = report(model)
    assert (said.chosen, said.reused) == (found["chosen"], found["reused"])
    assert said.chosen + said.reused == 2 * 3 * (NEW - 1)
    assert said.read == pytest.approx(found["read"] / found["cached"])
    assert f"read {said.read:.1%}" in str(said)


@pytest.mark.parametrize("case", EVERY)
def test_turns_go_on_from_the_cache_as_one_text(case):
    model = selecting(spec_of(case))
    text, cache, other = tokens(PROMPT), None, None
    for _ in range(3):
        out = model.generate(text, max_new_tokens=5, past_key_values=cache, return_dict_in_generate=True)
        cache, said = out.past_key_values, out.sequences
        if other is None:
            other = prompted(model, text)
            got = []
        else:
            got = [go_on(model, other, text[:, other.seen :])[:, -1].argmax(-1)]
        new = said[:, other.seen :]
        logits = go_on(model, other, new[:, :-1])
        assert torch.equal(logits.argmax(-1), new[:, 1:]) and all(torch.equal(one, new[:, 0]) for one in got)
        text = torch.cat([said, tokens(4)], 1)


@pytest.mark.parametrize("case", EVERY)
def test_staggered_sequences_equal_each_alone(case):
    if spec_of(case).queries:
        pytest.skip("what it knows is of the prompt that the sequences share, not of the part of it that each keeps")
    model = selecting(spec_of(case), roles="retrieval")
    ids, steps, pads = tokens(PROMPT), tokens(NEW, 3), [0, 3, 17]
    for decoded in (False, True):
        cache = prompted(model, ids)
        if decoded:  # then it has an index already
            go_on(model, cache, steps[:1, :1])
            cache.crop(-1)
        shared = cache.fork()
        shared.batch_repeat_interleave(3)
        shared.stagger(pads)
        mask = (torch.arange(PROMPT + NEW) >= torch.tensor(pads)[:, None]).long()
        got = go_on(model, shared, steps, mask)
        for row, pad in enumerate(pads):
            own = prompted(model, ids[:, : PROMPT - pad])
            same(got[row : row + 1], go_on(model, own, steps[row : row + 1]), 1e-5)  # positions are rounded alike


@pytest.mark.parametrize("case", EVERY)
def test_every_run_chooses_alike(case):
    outs = []
    for _ in range(2):
        model = selecting(spec_of(case))
        torch.manual_seed(3)
        ids = tokens(PROMPT, 2)
        outs.append(go_on(model, prompted(model, ids), tokens(NEW, 2)))
    assert torch.equal(*outs)


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST)
def test_compiled_tokens_are_the_model_s_own(case):
    torch._dynamo.reset()
    model = selecting(spec_of(case), dtype=torch.float32, head_dim=16)
    ids, steps = tokens(PROMPT, 2), tokens(NEW, 2)
    want = go_on(model, prompted(model, ids), steps)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model.forward, fullgraph=True, backend=backend)
    same(go_on(compiled, prompted(model, ids), steps), want, 1e-4)
    assert len(graphs) == 1
    torch._dynamo.reset()
