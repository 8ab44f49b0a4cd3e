"""Large buffers ask the system for huge pages, in the whole ones of their own memory; small ones do not."""

from __future__ import annotations

import pytest
import torch

from hf_longctx.decode._growing import Growing
from hf_longctx.layout import huge_pages
from hf_longctx.layout.heads import RoleHeads
from hf_longctx.layout.rows import Rows
from hf_longctx.stores.full import Full


@pytest.fixture
def asked(monkeypatch):
    """(address, bytes) of every wish."""
    found = []
    ask = lambda first, size, what: found.append((first, size)) or what  # noqa: E731
    monkeypatch.setattr(huge_pages, "_madvise", lambda: ask)
    return found


@pytest.mark.parametrize("more", [0, 1, huge_pages.HUGE - 64, huge_pages.HUGE])
def test_whole_huge_pages_of_its_own_memory(more, asked):
    x = torch.empty(huge_pages.LEAST + more, dtype=torch.uint8)
    assert huge_pages.in_huge_pages(x) is x
    ((first, size),) = asked
    assert first % huge_pages.HUGE == size % huge_pages.HUGE == 0
    assert x.data_ptr() <= first and first + size <= x.data_ptr() + x.nbytes
    assert size >= x.nbytes - 2 * huge_pages.HUGE


def test_what_is_small_or_on_a_device_asks_for_nothing(asked):
    huge_pages.in_huge_pages(torch.empty(huge_pages.LEAST - 1, dtype=torch.uint8))
    huge_pages.in_huge_pages(torch.empty(huge_pages.LEAST, dtype=torch.uint8, device="meta"))
    assert asked == []


def test_buffers_of_stores_and_of_indexes_ask(asked, monkeypatch):
    monkeypatch.setattr(huge_pages, "LEAST", 1 << 12)
    store = Full().new(RoleHeads("retrieval", (0, 1), 2), None)
    k, v = (torch.randn(1, 2, 100, 64) for _ in "kv")
    store.append(k, v, Rows(1, 0, 100))
    assert len(asked) == 2
    Growing().append(torch.randn(1, 2, 100, 64))
    assert len(asked) == 3


def test_a_system_without_them_is_no_error(monkeypatch):
    monkeypatch.setattr(huge_pages.sys, "platform", "win32")
    huge_pages._madvise.cache_clear()
    try:
        assert huge_pages._madvise() is None
        huge_pages.in_huge_pages(torch.empty(huge_pages.LEAST, dtype=torch.uint8))
    finally:
        huge_pages._madvise.cache_clear()


@pytest.mark.skipif(not huge_pages.sys.platform.startswith("linux"), reason="the wish is Linux's own")
def test_the_real_wish_is_taken():
    x = huge_pages.in_huge_pages(torch.empty(2 * huge_pages.LEAST, dtype=torch.uint8)).fill_(7)
    assert x.sum().item() == 7 * x.numel()
    first = -(-x.data_ptr() // huge_pages.HUGE) * huge_pages.HUGE
    assert huge_pages._madvise()(first, huge_pages.HUGE, huge_pages.MADV_HUGEPAGE) in (0, -1)  # -1: turned off there
