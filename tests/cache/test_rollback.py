"""Taking tokens back: what a cache remembers for it, what generate() spares, and how that is turned on."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from helpers.caches import patched_tiny, read
from helpers.generation import prompt
from helpers.store_cases import CASES, PAGED_SLOWLY, patched_case, role_of
from helpers.tiny import config_for, left_padded

from hf_longctx import CacheError, LongCtxCache, patch_model, report, unpatch_model
from hf_longctx.cache import file as cache_file
from hf_longctx.cache.seam import CACHE
from hf_longctx.layout.rows import Rows
from hf_longctx.stores.base import SLACK

WINDOWS = [case for case in CASES if role_of(case) == "streaming"]


def contents(cache) -> list[torch.Tensor]:
    """Copies of all tensors, with a number in slots that nobody wrote."""
    return [tensor.nan_to_num(7.0) for layer in cache.layers for tensor in layer.tensors()]


def history(cache) -> int:
    """Slots of all histories."""
    found = (store.segments.get("history") for layer in cache.layers for store in layer.stores)
    return sum(segment.k.shape[2] for segment in found if segment is not None)


@pytest.mark.spanning
@pytest.mark.parametrize("lengths", [[300], [300, 120, 9]])
@pytest.mark.parametrize("case", PAGED_SLOWLY)
@torch.no_grad()
def test_the_answers_do_not_depend_on_what_is_remembered(case, lengths):
    model = patched_case(case, torch.float64)
    ids, mask = left_padded([length + 80 for length in lengths])
    caches = [LongCtxCache(model, rollback=rollback) for rollback in (True, False)]
    at = 0
    for step in (300, *[1] * 20, 17, *[1] * 40, 3):
        at += step
        one, two = (read(model, cache, ids[:, at - step : at], mask[:, :at]) for cache in caches)
        assert torch.equal(one, two)
    assert [cache.is_recording_past(1) for cache in caches] == [True, False]
    assert caches[1].nbytes <= caches[0].nbytes
    if case in WINDOWS:
        assert caches[1].nbytes < 0.75 * caches[0].nbytes


@pytest.mark.spanning
@pytest.mark.parametrize("activate", [0, 10, 300])
@pytest.mark.parametrize("lengths", [[300], [300, 120, 9]])
@pytest.mark.parametrize("case", WINDOWS)
@torch.no_grad()
def test_recording_can_begin_at_any_time(case, lengths, activate):
    """What was dropped before stays gone, what is dropped from then on can be taken back."""
    model = patched_case(case, torch.float64)
    ids, mask = left_padded([length + 200 for length in lengths])
    cache = LongCtxCache(model, rollback=False)
    for at, end in itertools.pairwise(sorted({0, activate, 300, 301, 302, 340})):
        if at == activate:
            cache.activate_past_recording()
        read(model, cache, ids[:, at:end], mask[:, :end])
    oldest = cache.oldest_crop
    if activate == 300:  # a buffer may happen to hold more than is promised
        assert oldest == 300 or (case != "sink_recent" and oldest < 300)
    else:
        assert oldest <= 340 - SLACK
    with pytest.raises(CacheError, match="cannot crop from 340"):
        cache.crop(oldest - 1)
    for target in (330, max(oldest, 200)):
        cache.crop(target)
        for end in (target + 1, target + 2, target + 60):
            got = read(model, cache, ids[:, cache.seen : end], mask[:, :end])
            want = read(model, LongCtxCache(model), ids[:, :end], mask[:, :end])
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lengths", [[60], [60, 43, 2]])
@torch.no_grad()
def test_a_history_that_grows_while_tokens_are_taken_back(lengths):
    """Its slots are a ring whose size changes; what it remembers must find its place each time."""
    model = patched_tiny()
    ids, mask = left_padded([length + 400 for length in lengths])
    cache, at, sizes = LongCtxCache(model), 60, set()
    read(model, cache, ids[:, :60], mask[:, :60])
    for step, back in zip((1, 9, 30, 1, 2, 60, 1, 70, 130), (7, 1, 33, 2, 38, 50, 20, 90, 255), strict=True):
        for end in (at + step, at + step + 1):
            got = read(model, cache, ids[:, at:end], mask[:, :end])
            want = read(model, LongCtxCache(model), ids[:, :end], mask[:, :end])
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
            at = end
        sizes.add(history(cache))
        at = max(20, at - min(back, at - cache.oldest_crop))
        cache.crop(at)
    assert len(sizes) > 5


@torch.no_grad()
def test_taking_back_from_a_cache_that_remembers_nothing_is_refused():
    model, ids = patched_tiny(), torch.randint(3, 97, (1, 60))
    cache = LongCtxCache(model, rollback=False)
    read(model, cache, ids[:, :18])
    cache.crop(-7)
    assert cache.seen == 11, "nothing had left the window"
    read(model, cache, ids[:, 11:60])
    held = contents(cache)
    with pytest.raises(CacheError, match=r"cannot take back 3 tokens.*rollback=False.*activate_past_recording\(\)"):
        cache.crop(-3)
    assert all(map(torch.equal, held, contents(cache)))
    assert cache.stagger_room == 0
    cache.crop(0)
    cache.crop(60)
    assert cache.seen == 60 and history(cache) == 0
    want = read(model, LongCtxCache(model), torch.cat([ids, ids[:, :1]], 1))
    torch.testing.assert_close(read(model, cache, ids[:, :1]), want, rtol=0, atol=1e-9)
    cache.crop(-61)
    assert cache.seen == 0


@pytest.mark.parametrize("case", WINDOWS)
@torch.no_grad()
def test_copies_forks_and_files_keep_what_is_remembered(case, tmp_path):
    model, ids = patched_case(case, torch.float64), torch.randint(3, 97, (1, 60))
    for rollback in (True, False):
        cache = LongCtxCache(model, rollback=rollback)
        read(model, cache, ids[:, :50])
        cache.save(tmp_path / "cache")
        loaded = LongCtxCache.load(tmp_path / "cache", model)
        assert loaded.nbytes == cache.nbytes
        fork = cache.fork()
        assert fork.is_recording_past(0) == rollback and loaded.is_recording_past(0)
        for other in (fork, loaded, cache):
            want = read(model, LongCtxCache(model), ids[:, :55])
            torch.testing.assert_close(read(model, other, ids[:, 50:55]), want, rtol=0, atol=1e-9)
    loaded.crop(-5)  # recorded since it was loaded
    torch.testing.assert_close(read(model, loaded, ids[:, 50:55]), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("new", [5, 300])
@pytest.mark.parametrize("rollback", [True, False])
@torch.no_grad()
def test_after_an_interrupted_forward_what_the_message_says_works(rollback, new):
    """Between two layers: the first of them have read more than the others, and forgotten what their windows lost."""
    model, ids = patched_tiny(), torch.randint(3, 97, (1, 60 + new))
    cache = LongCtxCache(model, rollback=rollback)
    read(model, cache, ids[:, :60])

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(model, cache, ids[:, 60:])
    hook.remove()
    goes_back = rollback and new < SLACK
    said = r"Call cache.crop\(0\) to go back" if goes_back else r"cannot go back: call cache.reset\(\)"
    with pytest.raises(CacheError, match=f"between 60 and {60 + new} tokens.*{said}"):
        read(model, cache, ids[:, 60:])
    cache.crop(0) if goes_back else cache.reset()
    got = read(model, cache, ids[:, cache.seen :])
    torch.testing.assert_close(got, read(model, LongCtxCache(model), ids), rtol=0, atol=1e-6)


# What generate() makes.

FORWARD = {"greedy": {}, "sample": {"do_sample": True}, "beams": {"num_beams": 3}, "chunks": {"prefill_chunk_size": 16}}
HANDED_OUT = {
    "returned": {"return_dict_in_generate": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": -1},
    "assistant": {},
}


@pytest.mark.parametrize("mode", [*FORWARD, *HANDED_OUT])
def test_generate_remembers_where_somebody_can_take_back(mode, monkeypatch):
    model, made = patched_tiny(), []
    init = LongCtxCache.__init__

    def watched(cache, *args, **kwargs):
        init(cache, *args, **kwargs)
        made.append((cache.layers[0].plan is plan, cache.is_recording_past(0)))

    plan = LongCtxCache(model).plans[0]
    monkeypatch.setattr(LongCtxCache, "__init__", watched)
    more = {**FORWARD, **HANDED_OUT}[mode]
    if mode == "assistant":
        more = {"assistant_model": patched_tiny()}
    batch = prompt("prompt lookup" if mode in ("prompt lookup", "assistant") else mode)
    model.generate(**batch, max_new_tokens=4, **more)
    assert made and all(recording == (mode in HANDED_OUT) for _, recording in made)
    assert len({own for own, _ in made}) == 1 + (mode == "assistant"), "the assistant's cache as well"


@torch.no_grad()
def test_generate_takes_no_more_than_window_and_full_heads():
    """Half of the heads streaming, 2000 tokens: .5 + .08 of dense, and an eighth of room for the other half."""
    model = patched_tiny("mixed", sink=64, recent=256, layers=2)
    ids = torch.randint(3, 97, (1, 2000))
    shares = []
    for cache in (None, LongCtxCache(model)):
        model.generate(ids, max_new_tokens=2, past_key_values=cache)
        shares.append(report(model).nbytes / report(model).nbytes_dense)
    assert shares == [(2250 + 320) / 4000, (2250 + 320 + 256) / 4002], "a cache of one's own has read one token more"
    cache = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    assert cache.oldest_crop == cache.seen - SLACK


@torch.no_grad()
def test_sixteen_tokens_take_twice_what_they_need():
    model = patched_tiny("mixed", sink=64, recent=256, layers=2)
    model.generate(torch.randint(3, 97, (1, 16)), max_new_tokens=2)
    assert report(model).nbytes == 2 * report(model).nbytes_dense


def test_rejected_drafts_over_a_window_that_drops_give_greedy_tokens():
    """The verified tokens leave a window of 16 all the time, so a history that is not there would be seen."""
    model = patched_tiny(recent=8)
    asked = {**prompt("prompt lookup"), "max_new_tokens": 60, "eos_token_id": -1}
    crops, crop = [], LongCtxCache.crop
    want = model.generate(**asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LongCtxCache, "crop", lambda cache, n: (crops.append(int(n)), crop(cache, n)))
        assert torch.equal(model.generate(**asked, prompt_lookup_num_tokens=9), want)
    assert min(crops) < -2


def takes_two_back(model, input_ids, **kwargs):
    """A decoding loop that is not Transformers' own, for ``custom_generate``."""
    with torch.no_grad():
        model(input_ids, past_key_values=kwargs[CACHE])
    kwargs[CACHE].crop(-2)
    return input_ids


def test_a_loop_of_somebody_elses_can_take_back():
    """Given to one call, or by the checkpoint: Transformers puts its loop on the model as ``generate``."""
    model, asked = patched_tiny(), {**prompt("prompt lookup"), "max_new_tokens": 4}
    assert model.generate(**asked, custom_generate=takes_two_back).shape == (1, 45)
    unpatch_model(model)
    own = partial(type(model).generate, model, custom_generate=takes_two_back)
    model.generate = own
    patch_model(patch_model(model, config_for(model)), config_for(model))
    assert model.generate(**asked).shape == (1, 45)
    assert unpatch_model(model).generate is own


def test_a_loop_that_takes_back_is_told_how():
    """The class's own generate, past the model's, does not say that another loop runs."""
    model, asked = patched_tiny(), {**prompt("prompt lookup"), "max_new_tokens": 4, "custom_generate": takes_two_back}
    with pytest.raises(CacheError, match=r"cannot take back 2 tokens.*LongCtxCache\(model\) of your own"):
        type(model).generate(model, **asked)
    assert type(model).generate(model, **asked, past_key_values=LongCtxCache(model)).shape == (1, 45)


@pytest.mark.parametrize("lengths", [[60], [60, 43, 2]])
@torch.no_grad()
def test_files_of_the_first_format_are_read(lengths, tmp_path, monkeypatch):
    """In them a history has 256 slots from its first token on, whose modulus is 255."""
    model = patched_tiny()
    ids, mask = left_padded([length + 20 for length in lengths])
    cache = LongCtxCache(model)
    read(model, cache, ids[:, :60], mask[:, :60])
    for layer in cache.layers:
        (store,) = (store for store in layer.stores if "history" in store.segments)
        past, rows = store.segments["history"], Rows(len(lengths), 0, 60, cache.starts)
        assert past.k.shape[2] == 57
        store.segments["history"] = grown = store.new_segment(past.k, past.v, 256)
        store._copy_history(past, grown, rows, store.oldest, 60 - 16)
        grown.length = 256
    monkeypatch.setattr(cache_file, "VERSION", 1)
    cache.save(tmp_path / "old")
    loaded = LongCtxCache.load(tmp_path / "old", model)
    assert loaded.nbytes == cache.nbytes and history(loaded) == 3 * 256
    loaded.crop(-25)
    for at, end in ((35, 36), (36, 60), (60, 61), (61, 80)):
        got = read(model, loaded, ids[:, at:end], mask[:, :end])
        want = read(model, LongCtxCache(model), ids[:, :end], mask[:, :end])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        assert history(loaded) < 3 * 100, "from the first token on it has the slots that it needs"
