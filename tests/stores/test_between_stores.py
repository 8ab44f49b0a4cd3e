"""Stores of both roles together, through everything that can happen to a cache, one thing after the other."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from helpers.caches import read
from helpers.store_cases import BY_DATA, CASES, PAGED_SLOWLY, ROUNDED, case_config, patched_case, role_of
from helpers.tiny import config_for, left_padded, tiny_model

from hf_longctx import CacheError, LongCtxCache, patch_model
from hf_longctx.stores.base import SLACK

RETRIEVAL = [case for case in CASES if role_of(case) == "retrieval" and case not in BY_DATA]  # a journal needs the rule
STREAMING = [case for case in CASES if role_of(case) == "streaming"]
STEPS = ("fork", "fork", "switch", "back", "back", "reorder", "repeat", "select", "copy", "save", "stagger")
PAIRS = [(one, other) for one in RETRIEVAL for other in STREAMING]


def patched_pair(retrieval: str, streaming: str, dtype=torch.float64, **top):
    model = tiny_model("llama", dtype)
    stores = {"retrieval": CASES[retrieval], "streaming": CASES[streaming]}
    return patch_model(model, config_for(model, stores=stores, **top))


class Journal:
    """A cache and what each of its rows has read, forward by forward, which a fresh cache can read again."""

    def __init__(self, model, starts):
        self.model, self.cache, self.starts = model, LongCtxCache(model), list(starts)
        self.ids = torch.zeros(len(starts), 0, dtype=torch.long)
        self.cuts: list[list[int]] = [[] for _ in starts]  # slots after each forward
        self.most = 0

    def with_cache(self, cache) -> Journal:
        other = copy.copy(self)
        other.cache, other.starts, other.cuts = cache, list(self.starts), [list(cuts) for cuts in self.cuts]
        return other

    def more(self, tokens: int, wrong: int = 0) -> float:
        """Read ``tokens`` random ones; how far the logits are from those of every row alone, in the same pieces."""
        new, at = torch.randint(3, 97, (len(self.starts), tokens)), self.cache.seen
        got = self.read(self.cache, new, self.starts, at)
        self.ids = torch.cat([self.ids, (new + wrong - 3) % 94 + 3], 1)
        self.most = max(self.most, at + tokens)
        for cuts in self.cuts:
            cuts.append(at + tokens)
        rows = [row for row, start in enumerate(self.starts) if start < at + tokens]
        return max((got[row] - self.alone(row)).abs().max().item() for row in rows)

    def alone(self, row: int) -> torch.Tensor:
        cache, start = LongCtxCache(self.model), self.starts[row]
        at = start
        for cut in self.cuts[row]:
            if cut > at:
                out = self.read(cache, self.ids[row : row + 1, at:cut], [0], at - start)
                at = cut
        return out[0]

    def read(self, cache, new, starts, past) -> torch.Tensor:
        starts = torch.tensor(starts)[:, None]
        slots = torch.arange(past + new.shape[1])
        positions = (slots[past:] - starts).clamp(min=0)  # the same numbers, so that rotations are rounded alike
        given = {"attention_mask": (slots >= starts).long(), "position_ids": positions}
        with torch.no_grad():
            return self.model(new, past_key_values=cache, **given).logits[:, -1]

    def back(self, tokens: int) -> None:
        self.cache.crop(-tokens)
        at = self.cache.seen
        self.ids = self.ids[:, :at]
        self.cuts = [sorted({min(cut, at) for cut in cuts}) for cuts in self.cuts]
        self.starts = [min(start, at) for start in self.starts]

    def rows(self, picked: list[int]) -> None:
        self.ids, self.starts = self.ids[picked], [self.starts[row] for row in picked]
        self.cuts = [list(self.cuts[row]) for row in picked]

    def stagger(self, pads: list[int]) -> None:
        self.cache.stagger(pads)
        at, given = self.cache.seen, self.ids
        self.ids = torch.zeros_like(given)
        for row, count in enumerate(pads):
            self.ids[row, count:] = given[row, : at - count]
            self.cuts[row] = sorted({min(cut + count, at) for cut in self.cuts[row]})
        self.starts = list(pads)


def walk(model, seed: int, folder, rounded: bool) -> tuple[float, set[str]]:
    """All steps in a random order, each followed by some tokens; the largest error, and what was done."""
    rng, done = random.Random(seed), set()
    torch.manual_seed(seed)
    text = Journal(model, [[0], [0, 147, 179], [0, 0]][seed % 3])
    texts, worst = [text], max(text.more(180), text.more(rng.choice([1, 60])))
    for what in rng.sample(STEPS, len(STEPS)):
        text = rng.choice(texts[:-1] or texts) if what == "switch" else texts[-1]
        cache, count = text.cache, len(text.ids)
        room = text.cache.seen - max(1, text.cache.oldest_crop, (text.most - SLACK) * rounded)
        if what == "fork":
            text = text.with_cache(cache.fork())
        elif what == "back" and room > 0:
            text.back(rng.randint(1, room))
        elif what == "reorder":
            picked = [rng.randrange(count) for _ in range(count)]
            cache.reorder_cache(torch.tensor(picked))
            text.rows(picked)
        elif what == "repeat" and count < 3:
            cache.batch_repeat_interleave(2)
            text.rows([row for row in range(count) for _ in range(2)])
        elif what == "select":
            cache.batch_select_indices(torch.tensor([count - 1]))
            text.rows([count - 1])
        elif what == "copy":
            change = rng.choice([copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
            text = text.with_cache(change(cache))
        elif what == "save":
            cache.save(folder / "a", model=model)
            text = text.with_cache(LongCtxCache.load(folder / "a", model))
            text.cache.save(folder / "b")
            assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
        elif what == "stagger" and cache.stagger_room:
            text.stagger([rng.randint(0, cache.stagger_room) for _ in range(count)])
        elif what != "switch":
            continue
        done.add(what)
        texts = [*[one for one in texts if one is not text], text][-4:]
        worst = max(worst, text.more(rng.choice([1, 1, 2, 17, 140])))
        assert torch.equal(text.cache.ids, text.ids)
    return worst, done


@pytest.mark.spanning
@pytest.mark.parametrize("retrieval", [one for one in PAGED_SLOWLY if one.values[0] in RETRIEVAL])
@pytest.mark.parametrize("streaming", STREAMING)
def test_every_pair_of_stores_through_the_life_of_a_cache(retrieval, streaming, tmp_path):
    rounded, done = retrieval in ROUNDED, set()
    for seed in range(3):
        worst, some = walk(patched_pair(retrieval, streaming), seed, tmp_path, rounded)
        assert worst < 1e-8
        done |= some
    assert done | {"stagger"} == set(STEPS)
    stores = [store for layer in LongCtxCache(patched_pair(retrieval, streaming)).layers for store in layer.stores]
    assert ("stagger" in done) == all(store.staggers for store in stores)
    assert (retrieval, streaming) != ("full", "sink_recent") or "stagger" in done, "a pair that can"


def test_a_wrong_journal_is_noticed():
    assert ("full", "sink_recent") in PAIRS
    for pair in PAIRS:
        text = Journal(patched_pair(*pair), [0, 9])
        assert text.more(40) < 1e-8
        text.more(1, wrong=1)
        assert text.more(1) > 1e-4, "a control"


def dtypes_of(cache, case) -> set[torch.dtype]:
    """Of all that is cached; what is known beside keys and values to choose by has dtypes of its own."""
    tensors = [tensor for layer in cache.layers for tensor in layer.tensors()]
    return {x.dtype for x in tensors if case not in BY_DATA or x.shape[-1] == cache.own[0].head_dim}


@pytest.mark.spanning
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("fork", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_autocast_may_be_switched_and_what_is_kept_is_not_rounded_again(case, fork, first):
    """Rows of one length or padded, by chunks and tokens, past every buffer's first size."""
    model = patched_case(case, torch.float32)
    ids, mask = left_padded([1010, 1000])
    cache, exact, at = LongCtxCache(model), LongCtxCache(model), 0
    for step in (330, 1, 1, 140, 1, 530, 1, 1):
        new, seen = ids[:, at : at + step], mask[:, : at + step]
        with torch.autocast("cpu", torch.bfloat16, enabled=first == (at < 331)):
            got = read(model, cache, new, seen)
        want = read(model, exact, new, seen)
        assert (got.float() - want).abs().mean() < 0.5 * want.std()
        at += step
        if at == 331:
            cache = cache.fork() if fork else cache
            dtypes = dtypes_of(cache, case)
    assert dtypes_of(cache, case) == dtypes
    assert (torch.bfloat16 in dtypes) == first
    assert (torch.float32 in dtypes) == (not first)


@pytest.mark.parametrize("case", CASES)
def test_a_cache_filled_under_autocast_is_loaded_and_goes_on_without(case, tmp_path):
    model = patched_case(case, torch.float32)
    ids = torch.randint(3, 97, (2, 90))
    for on in (True, False):
        cache = LongCtxCache(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            read(model, cache, ids)
        cache.save(tmp_path / "a")
        loaded = LongCtxCache.load(tmp_path / "a", model)
        for enabled in (not on, on):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                assert torch.equal(read(model, loaded, ids[:, :3]), read(model, cache, ids[:, :3]))


@pytest.mark.parametrize("case", CASES)
def test_copies_of_a_cache_that_was_forked_hold_no_more_than_it(case):
    model = patched_case(case, torch.float32)
    cache = LongCtxCache(model)
    read(model, cache, torch.randint(3, 97, (1, 2000)))
    fork = cache.fork()
    many = cache.fork()
    many.batch_repeat_interleave(4)
    for one in (cache, fork, many):
        read(model, one, torch.randint(3, 97, (one.batch_size, 3)))
        for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert 0.9 * one.nbytes < other.nbytes <= one.nbytes
            assert other.nbytes_offloaded == one.nbytes_offloaded


@pytest.mark.parametrize("case", CASES)
def test_a_copy_made_in_inference_mode_goes_on_outside(case):
    model = patched_case(case, torch.float64)
    ids = torch.randint(3, 97, (2, 90))
    cache = LongCtxCache(model)
    read(model, cache, ids)
    for change in (copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))):
        one, other = change(cache), change(cache.fork())
        with torch.inference_mode():
            two, three = change(cache), change(cache.fork())
        for step in (1, 30, 1):
            want = read(model, one, ids[:, :step])
            for also in (other, two, three):
                torch.testing.assert_close(read(model, also, ids[:, :step]), want, rtol=0, atol=1e-12)
        assert two.ids.equal(one.ids)


class Stop(BaseException):
    """As a KeyboardInterrupt, which would end the tests."""


def stop(*args):
    raise Stop


@pytest.mark.spanning
@pytest.mark.parametrize("when", ["prepare", "append", "after append"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_a_forward_that_was_interrupted_is_taken_back_or_refused(case, layer, when, monkeypatch):
    model = patched_case(case, torch.float64)
    ids, mask = left_padded([60, 41])
    text = Journal(model, [0, 19])
    assert text.more(60) < 1e-8
    store = next(store for store in text.cache.layers[layer].stores if store.heads.role == role_of(case))
    name, append = when.split()[-1], store.append
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(store, name, (lambda *args: stop(append(*args))) if when == "after append" else stop)
        text.read(text.cache, ids[:, :20], text.starts, 60)
    if name == "prepare":
        text.cache.crop(0)
        assert text.more(3) < 1e-8
        return
    for change in (
        lambda: text.cache.reorder_cache(torch.tensor([1, 0])),
        lambda: text.cache.batch_repeat_interleave(2),
        lambda: text.cache.batch_select_indices(torch.tensor([0])),
        lambda: text.cache.crop(0),
        lambda: text.cache.crop(-3),
        lambda: text.cache.fork(),
        lambda: text.cache.stagger([0, 1]),
        lambda: text.read(text.cache, ids[:, :1], text.starts, 60),
    ):
        with pytest.raises(CacheError):
            change()
    text.cache.reset()
    text.ids, text.cuts = text.ids[:, :0], [[], []]
    assert max(text.more(60), text.more(2)) < 1e-8


@pytest.mark.parametrize("after", [0, 1, 2])
def test_beams_that_were_interrupted_between_two_layers_are_noticed(after, monkeypatch):
    model = patched_case("full", torch.float64)
    cache, ids = LongCtxCache(model), torch.randint(3, 97, (2, 60))
    read(model, cache, ids)
    monkeypatch.setattr(cache.layers[after], "map_rows", stop)
    with pytest.raises(Stop):
        cache.reorder_cache(torch.tensor([1, 1]))
    with pytest.raises(CacheError, match="interrupted while it was written"):
        read(model, cache, ids[:, :1])
    cache.reset()
    assert read(model, cache, ids).isfinite().all()


def test_a_saved_cache_may_be_loaded_with_another_folder_for_its_pages(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    ids, file = torch.randint(3, 97, (1, 200)), tmp_path / "a"
    model = patched_case("offloaded_disk", torch.float64, folder=str(tmp_path / "here"))
    cache = LongCtxCache(model)
    read(model, cache, ids)
    cache.save(file)
    assert str(tmp_path).encode() not in file.read_bytes(), "no path of this machine"
    want = read(model, cache, ids[:, :3])
    patch_model(model, case_config(model, "offloaded_disk", folder=str(tmp_path / "there"), resident=2**25))
    loaded = LongCtxCache.load(file, model)
    assert len(list((tmp_path / "there").glob("*/*.safetensors"))) > 10
    assert torch.equal(read(model, loaded, ids[:, :3]), want)
    patch_model(model, case_config(model, "offloaded_disk", page=32))
    with pytest.raises(CacheError, match="made with another config"):
        LongCtxCache.load(file, model)
