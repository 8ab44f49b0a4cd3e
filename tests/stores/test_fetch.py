"""Pages on their way to a GPU, with a device that does each copy as early or as late as the streams allow."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from helpers.paged_cases import full_model, paged_config, paged_model, paged_stores, pages_of, read
from helpers.tiny import left_padded, tiny_model

from hf_longctx import LongCtxCache, patch_model
from hf_longctx.stores import _fetch
from hf_longctx.stores._fetch import Fetcher
from hf_longctx.stores._page import HostMemory, HostPage


class Device:
    """Stands for CUDA streams: what is asked of the side stream runs at a time that the events leave open.

    ``when``: "early" at once, "late" when somebody waits for it, or a random generator that tosses a coin.
    """

    def __init__(self, when):
        self.when, self.queue, self.copies = when, [], 0

    def copy(self, pairs):
        self.queue.append(pairs)
        self.copies += 1
        if self.when == "early" or (self.when != "late" and self.when.random() < 0.5):
            self._run(self.copies)
        return self.copies

    def wait(self, event):
        self._run(event)

    def _run(self, until):
        while self.queue and self.copies - len(self.queue) < until:
            for into, out in self.queue.pop(0):
                into.copy_(out)


WHENS = ["early", "late", "random"]


@pytest.fixture
def device(monkeypatch):
    """Makes the stand-in device, through which all pages of the CPU are read."""
    made = []

    def make(when):
        streams = Device(random.Random(0) if when == "random" else when)
        made.append(Fetcher(torch.device("cpu"), streams))
        monkeypatch.setattr(_fetch, "fetcher", lambda device: made[-1])
        return made[-1]

    return make


def lists(*lengths: int) -> list[list[HostPage]]:
    memory = HostMemory()
    return [[memory.write(*torch.randn(2, 2, 3, 16, 4)) for _ in range(length)] for length in lengths]


def asked(pages) -> list:
    return [(page, slice(None)) for page in pages]


@pytest.mark.parametrize("when", WHENS)
def test_every_page_comes_whole_and_the_next_layer_s_first_one_ahead(when, device):
    fetcher = device(when)
    layers = lists(4, 1, 0, 2, 3)
    for step in range(4):
        for pages in layers:
            count = 0
            for page, (k, v) in zip(pages, fetcher.read(asked(pages)), strict=True):
                assert torch.equal(k, page.k) and torch.equal(v, page.v)
                count += 1
            assert count == len(pages)
        # The order of layers is known from the second step on; the last layer is followed by the first.
        assert fetcher.ahead == [0, 4, 8, 12][step]
        assert fetcher.asked == 10 * (step + 1) + (1 if step else 0)
    assert len({b.data_ptr() for b in fetcher.buffers}) == 2, "two buffers, whatever was read"


@pytest.mark.parametrize("when", WHENS)
def test_a_page_that_was_fetched_for_nothing_does_no_harm(when, device):
    fetcher, rng = device(when), random.Random(1)
    layers = lists(2, 3, 1)
    layers.append([HostMemory().write(*torch.randn(2, 5, 3, 32, 4)) for _ in range(2)])  # larger ones
    layers.append([HostMemory().write(*torch.randn(2, 1, 3, 16, 4).to(torch.bfloat16)) for _ in range(2)])
    for _ in range(60):
        pages = rng.choice(layers)
        rows = slice(0, 1) if rng.random() < 0.3 else slice(None)
        stop = rng.randint(1, len(pages))
        for at, (k, v) in enumerate(fetcher.read([(page, rows) for page in pages])):
            assert torch.equal(k, pages[at].k[rows]) and torch.equal(v, pages[at].v[rows])
            if at + 1 == stop:
                break
    assert fetcher.ahead > 0


def test_a_buffer_that_is_used_too_early_is_seen(device):
    """The control: with one buffer the next page overwrites the one being read."""
    fetcher = device("early")

    class One(Fetcher):
        @property
        def turn(self):
            return 0

        @turn.setter
        def turn(self, value): ...

    (pages,) = lists(3)
    broken = One(fetcher.device, fetcher.streams)
    assert not all(torch.equal(k, p.k) for p, (k, _) in zip(pages, broken.read(asked(pages)), strict=True))
    late = One(fetcher.device, Device("late"))
    late.streams.wait = lambda event: None  # and one that waits for nothing reads what is not there yet
    assert not all(torch.equal(k, p.k) for p, (k, _) in zip(pages, late.read(asked(pages)), strict=True))


def test_nothing_is_kept_alive_but_the_two_buffers(device):
    fetcher = device("late")
    pages = lists(2, 2)
    for _ in range(2):
        for one in pages:
            for _ in fetcher.read(asked(one)):
                pass
    fetcher.coming = None
    fetcher.streams.queue.clear()
    assert len(fetcher.followers) == 2
    del pages, one
    gc.collect()
    assert len(fetcher.followers) == 0


@pytest.mark.spanning
@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("word", ["offloaded", "offloaded_disk"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_model_whose_pages_come_that_way_answers_the_same(when, word, padded, device, shadow):
    fetcher = device(when)
    model = tiny_model("llama", torch.float64)
    config = paged_config(model, word)
    patch_model(model, config)
    watch = shadow(config)
    ids, mask = left_padded([130, 60, 5] if padded else [130, 130])
    cache, done = LongCtxCache(model), 0
    with torch.no_grad():
        for count in (60, 7, 33, *[1] * 30):
            done += count
            seen = mask[:, :done] if padded else None
            model(ids[:, done - count : done], attention_mask=seen, past_key_values=cache)
            if done == 110:
                cache.reorder_cache(torch.arange(ids.shape[0]))
    assert watch.error <= 1e-12
    before, asked_before = fetcher.ahead, fetcher.asked
    read(model, cache, ids[:, :1], torch.cat([mask, mask[:, :1] | 1], 1) if padded else None)
    assert fetcher.ahead - before == 3, "one for each layer: of the next, and of the first for the token to come"
    assert fetcher.asked - asked_before == sum(map(len, pages_of(cache)))
    assert all(store.pages.fetchers == [fetcher] for store in paged_stores(cache))


@pytest.mark.parametrize("word", ["offloaded", "offloaded_disk"])
def test_two_caches_in_turn_and_beams(word, device):
    device("late")
    model, plain = paged_model(word), full_model()
    ids = torch.randint(3, 97, (2, 90))
    pairs = [[(one, LongCtxCache(one)) for one in (model, plain)] for _ in range(2)]
    for pair in pairs:
        for one, cache in pair:
            read(one, cache, ids)
    for step in range(25):
        for at, pair in enumerate(pairs):
            order = torch.tensor([(step + at) % 2, 1])
            token = torch.randint(3, 97, (2, 1))
            for _, cache in pair:
                cache.reorder_cache(order)
            got, want = (read(one, cache, token) for one, cache in pair)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    fork = pairs[0][0][1].fork()
    del pairs
    gc.collect()
    assert torch.isfinite(read(model, fork, ids[:, :1])).all()


def test_a_cpu_has_no_fetcher_and_a_thread_has_one_per_device(monkeypatch):
    assert _fetch.fetcher(torch.device("cpu")) is None
    monkeypatch.setattr(_fetch, "Streams", lambda device: Device("late"))
    first = _fetch.fetcher(torch.device("cuda", 0))
    assert _fetch.fetcher(torch.device("cuda", 0)) is first is not _fetch.fetcher(torch.device("cuda", 1))
    del first
    gc.collect()
    assert len(_fetch._local.fetchers) == 0, "its buffers go with the last cache that used it"
