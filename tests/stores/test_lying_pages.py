"""Chosen tokens of pages on the CPU are read where they lie: in host memory, or in files that are mapped once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers.tiny import config_for, tiny_model

from hf_longctx import CacheError, LongCtxCache, patch_model
from hf_longctx.cache.seam import CACHE
from hf_longctx.kernels import base as kernels
from hf_longctx.kernels import cpu
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.forward import Forward
from hf_longctx.layout.gather import gathered, listed_tokens, lying
from hf_longctx.layout.heads import RoleHeads
from hf_longctx.layout.reads import ALL
from hf_longctx.layout.rows import Rows
from hf_longctx.layout.scores import Scores
from hf_longctx.stores import _page
from hf_longctx.stores.offloaded import Offloaded
from hf_longctx.stores.offloaded_disk import OffloadedDisk

HEADS = RoleHeads("retrieval", (0, 1), 2)
TOKENS, SIZE = 200, 8


@pytest.fixture(params=[Offloaded, OffloadedDisk])
def store(request, tmp_path):
    torch.manual_seed(0)
    more = {"folder": str(tmp_path)} if request.param is OffloadedDisk else {}
    return request.param(page=32, recent=20, **more).new(HEADS, None)


def filled(store, rows=1):
    """What a token at the position ``TOKENS - 1`` has: six pages and a buffer."""
    k, v = (torch.randn(rows, 2, TOKENS, 16, dtype=torch.float64) for _ in "kv")
    store.append(k[:, :, :-1], v[:, :, :-1], Rows(rows, 0, TOKENS - 1))
    return store.append(k[:, :, -1:], v[:, :, -1:], Rows(rows, TOKENS - 1, 1))


def listed(*entries: int, rows=1) -> BlockList:
    indices = torch.tensor(entries, dtype=torch.int32).expand(rows, 2, 1, -1).contiguous()
    none = indices.new_zeros(rows, 2, 0)
    counts = torch.full((rows, 2, 1), len(entries), dtype=torch.int32)
    return BlockList(SIZE, TOKENS - 1, TOKENS, indices, counts, none, indices.new_zeros(rows, 2))


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("entries", [(0, 24), (0, 1, 9, 17, 24), tuple(range(25))], ids=len)
def test_they_give_what_copies_give(store, start, entries):
    part = filled(store, rows=2)
    segments = part.alone(slice(1, 2), start)
    blocks = listed(*entries)
    if start:
        blocks = BlockList(
            SIZE, TOKENS - 6, TOKENS - 5, blocks.indices, blocks.counts, blocks.columns, blocks.column_counts
        )
        blocks.indices.clamp_(max=24)
    q = torch.randn(1, 4, 1, 16, dtype=torch.float64)
    scores = Scores(0.3)
    forward = Forward(Rows(1, TOKENS - 1, 1))
    want, _ = cpu.attend(q, [gathered(segments, blocks)], ALL, scores)
    got, _ = kernels.attend("auto", q, segments, blocks, scores, forward)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    other, _ = cpu.attend(q, [gathered(segments, listed(0, 3))], ALL, scores)
    assert not torch.allclose(got, other, atol=1e-3), "a control"


def test_only_pages_with_a_chosen_token_are_read(store, monkeypatch):
    part = filled(store)
    touched = []
    for kind in {type(entry.page) for entry in store.pages.entries}:
        real = kind.mapped

        def spy(self, real=real):
            touched.append([entry.page for entry in store.pages.entries].index(self))
            return real(self)

        monkeypatch.setattr(kind, "mapped", spy)
        monkeypatch.setattr(
            kind, "read", lambda self: pytest.fail("all of a page is read")
        ) if kind is not _page.HostPage else None
    segments = part.alone(slice(None), 0)
    found = lying(segments, listed(0, 9, 10, 24))  # pages of 32 tokens: the first, the third, and the buffer
    assert touched == [0, 2]
    assert [one.length for one in found] == [32] * 5 + [40]
    assert found[1].k.stride()[:3] == (0, 0, 0), "no memory of its own"
    assert found[0].k.data_ptr() != found[2].k.data_ptr()


def test_reordered_rows_are_gathered(store):
    filled(store, rows=2)
    store.map_rows(lambda x: x.index_select(0, torch.tensor([1, 0])))
    k, v = (torch.randn(2, 2, 1, 16, dtype=torch.float64) for _ in "kv")
    part = store.append(k, v, Rows(2, TOKENS, 1))
    segments = part.alone(slice(None), 0)
    assert lying(segments, listed(0, 3, rows=2)) is None
    tokens, _ = listed_tokens(listed(0, 3, rows=2))
    assert gathered(segments, listed(0, 3, rows=2)).k.shape == (2, 2, tokens.shape[2], 16)


@pytest.fixture
def page(tmp_path):
    x = torch.arange(64, dtype=torch.float32).view(1, 1, 16, 4)
    return _page.Folder(str(tmp_path)).write(x, -x)


def test_a_file_is_mapped_once_and_its_map_goes_with_the_page(page, monkeypatch):
    opened = []
    real = _page.safe_open
    monkeypatch.setattr(_page, "safe_open", lambda *given, **more: opened.append(1) or real(*given, **more))
    for _ in range(3):
        assert page.mapped()[0][0, 0, 3, 1] == 13
    assert len(opened) == 1 and page in _page._maps
    page.read()
    assert len(opened) == 2, "whole pages are opened and compared anew"
    count = len(_page._maps)
    del page
    monkeypatch.undo()
    assert len(_page._maps) <= count


def test_no_more_files_are_mapped_than_a_process_may(tmp_path, monkeypatch):
    monkeypatch.setattr(_page, "MAPS", 2)
    folder = _page.Folder(str(tmp_path))
    pages = [folder.write(*(torch.full((1, 1, 2, 4), float(number)) for _ in "kv")) for number in range(4)]
    for number, one in enumerate(pages):
        assert one.mapped()[0].unique().item() == number
    assert list(_page._maps) == pages[2:]
    assert pages[0].mapped()[0].unique().item() == 0
    assert list(_page._maps) == [pages[3], pages[0]]


@pytest.mark.parametrize("how", ["written", "cut", "gone"])
def test_a_file_that_was_touched_is_refused(page, how):
    page.mapped()
    path = Path(page.path)
    before = os.stat(path)
    if how == "written":
        path.write_bytes(path.read_bytes()[:-4] + b"abcd")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    elif how == "cut":
        os.truncate(path, before.st_size - 1)
    else:
        path.unlink()
    with pytest.raises(CacheError, match="is not what was written to it"):
        page.mapped()


def test_a_cache_goes_on_under_another_selection(tmp_path):
    """What is cached does not depend on what decoded tokens read of it."""
    model = tiny_model()
    few = {"select": "page_bounds", "page": 4, "budget": 8, "sink": 4, "recent": 8, "min_tokens": 0, "dense_layers": 0}
    ids = torch.randint(3, 97, (1, 90))

    def last(cache, decode):
        patch_model(model, config_for(model, decode={"retrieval": decode}))
        with torch.no_grad():
            return model(ids[:, 80:81], **{CACHE: cache.fork()}).logits

    patch_model(model, config_for(model))
    cache = LongCtxCache(model)
    with torch.no_grad():
        model(ids[:, :80], **{CACHE: cache})
    dense, some, more = (last(cache, one) for one in ({"select": "dense"}, few, {**few, "budget": 400}))
    assert torch.equal(dense, more) and not torch.allclose(dense, some, atol=1e-3)
    assert torch.equal(last(cache, {"select": "dense"}), dense), "and back"
    patch_model(model, config_for(model, "retrieval", decode={"retrieval": few}))
    with pytest.raises(CacheError, match="another config .other roles, decode"), torch.no_grad():
        model(ids[:, 80:81], **{CACHE: cache})
