"""Cached tokens by their row position: what is found, wherever it lies, and what is left alone."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.block_lists import block_list, random_qkv
from helpers.calls import sparse
from helpers.halves import Halves
from helpers.packed_cases import numbers_of, packed

from hf_longctx.errors import CacheError
from hf_longctx.kernels import reference
from hf_longctx.layout import gather
from hf_longctx.layout.gather import gathered, key_pieces, keys, listed_tokens, shape_of, take, tokens_in
from hf_longctx.layout.reads import ALL
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import Segment
from hf_longctx.stores._page import DiskPage, Folder, HostMemory, HostPage
from hf_longctx.stores._pages import Entry, Pages

BATCH, HEADS, DIM = 2, 3, 8
SIZES = [1, 63, 64, 65]
KINDS = ["one", "several", "fork", "packed", "host", "disk", "own", "host and plain", "packed and plain"]
HOMES = {"host": HostMemory, "disk": lambda: Folder(None)}


def random(tokens: int, batch: int = BATCH):
    return torch.randn(2, batch, HEADS, tokens, DIM, dtype=torch.float64)


def plain(k, v, shared=False) -> Segment:
    """A segment with room that nobody wrote."""
    rooms = [x.new_empty(*x.shape[:2], x.shape[2] + 5, DIM).fill_(torch.nan) for x in (k, v)]
    for room, x in zip(rooms, (k, v), strict=True):
        room[:, :, : x.shape[2]] = x
    return Segment(*(room.expand(BATCH, -1, -1, -1) for room in rooms), k.shape[2], shared=shared)


def paged(k, v, home="host", page=16) -> Pages:
    written = HOMES[home]()
    parts = zip(k.split(page, 2), v.split(page, 2), strict=True)
    entries = [Entry(written.write(a, b), 0, a.shape[2]) for a, b in parts]
    return Pages(entries, k.device, k.dtype, "offloaded")


def laid(kind: str, tokens: int):
    """Segments, and the keys and values ``[B, n, S, D]`` in them."""
    k, v = random(tokens)
    if kind == "one":
        return [plain(k, v)], k, v
    cut = tokens // 3
    if kind == "several":
        cuts = [(0, cut), (cut, tokens - 1), (tokens - 1, tokens), (tokens, tokens)]
        return [plain(k[:, :, a:b], v[:, :, a:b]) for a, b in cuts], k, v
    if kind == "fork":
        k, v = (torch.cat([x[:1, :, :cut].expand(BATCH, -1, -1, -1), x[:, :, cut:]], 2) for x in (k, v))
        first = plain(k[:1, :, :cut], v[:1, :, :cut], shared=True)
        return [first, plain(k[:, :, cut:], v[:, :, cut:])], k, v
    if kind == "own":
        return [Halves(k, v)], k, v
    if kind.startswith("packed"):
        made = packed((BATCH, HEADS, 1, DIM), -(-tokens // 16) * 16, 4, 16, [tokens] * BATCH, dtype=torch.float64)
        own = [x[:, :, :tokens] for x in numbers_of(made)[:2]]
    else:
        made, own = paged(k, v, kind.partition(" ")[0]), [k, v]
    if kind.endswith("plain"):
        more = random(7)
        return [made, plain(*more)], *(torch.cat(pair, 2) for pair in zip(own, more, strict=True))
    return [made], *own


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_tokens_are_those_of_their_positions(kind, tokens):
    segments, k, v = laid(kind, tokens)
    total = k.shape[2]
    assert shape_of(segments) == (BATCH, HEADS, total, DIM) and tokens_in(segments) == total
    for low, high in {(0, total), (total - 1, total), (total // 4, total // 2 + 1), (total // 3, total)}:
        assert torch.equal(keys(segments, low, high), k[:, :, low:high])
    for width in (1, total, 2 * total + 1):
        at = torch.randint(0, total, (BATCH, HEADS, width))
        at[..., -1] = total - 1
        found = take(segments, at)
        for x, whole in zip(found, (k, v), strict=True):
            assert torch.equal(x, whole.gather(2, at[..., None].expand(-1, -1, -1, DIM)))


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_whole_and_in_order(kind, monkeypatch):
    segments, k, _ = laid(kind, 65)
    monkeypatch.setattr(gather, "TEMPORARY", 20 * BATCH * HEADS * DIM)
    for low, high, multiple in ((0, 65, 1), (3, 60, 1), (8, 64, 8), (5, 64, 16), (7, 7, 4)):
        found = [(at, piece.clone()) for at, piece in key_pieces(segments, low, high, multiple)]
        assert all(piece.shape[2] % multiple == 0 and piece.shape[2] <= 20 for _, piece in found[:-1])
        assert [at for at, _ in found] == [low + sum(p.shape[2] for _, p in found[:i]) for i in range(len(found))]
        if low < high:
            assert len(found) > 1 and torch.equal(torch.cat([piece for _, piece in found], 2), k[:, :, low:high])
        else:
            assert not found


def test_keys_of_one_segment_are_no_copy():
    segments, k, _ = laid("one", 64)
    assert keys(segments, 3, 60).untyped_storage().data_ptr() == segments[0].k.untyped_storage().data_ptr()


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("kv_len", [1, 2, 63, 64, 65, 130])
def test_what_a_list_names_is_attended(kv_len, group, columns):
    """A list per query head or per KV head, of blocks and of columns, over one segment and over several."""
    for lists in {1, group}:
        made = block_list(kv_len - 1, kv_len, 16, heads=2 * lists)
        if not columns:
            made = replace(made, columns=made.columns[:, :, :0], column_counts=torch.zeros_like(made.column_counts))
        q, k, v = random_qkv(made, group)
        want = sparse(reference, q, k, v, made, 0.3)
        cut = kv_len // 3
        for segments in (
            [Segment(k, v, kv_len)],
            [Segment(k[:, :, :cut], v[:, :, :cut], cut), Segment(k[:, :, cut:], v[:, :, cut:], kv_len - cut)],
        ):
            found = gathered(segments, made)
            assert found.k.isfinite().all() and found.k.shape[1] == 2 * lists
            got, _ = reference.attend(q, [found], ALL, Scores(0.3))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        tokens, named = listed_tokens(made)
        visible = torch.zeros(*tokens.shape[:2], kv_len, dtype=torch.long).scatter_add_(2, tokens, named.long())
        assert torch.equal(visible, made.visible()[:, :, 0].long()), "each once"


class Touched:
    """Counts how often each page is read."""

    def __init__(self, monkeypatch):
        self.whole, self.parts = Counter(), Counter()
        for cls in (HostPage, DiskPage):
            for name, counter in (("read", self.whole), ("read_at", self.parts)):
                monkeypatch.setattr(cls, name, self.counted(getattr(cls, name), counter))

    @staticmethod
    def counted(method, counter):
        def read(page, *given):
            counter[id(page)] += 1
            return method(page, *given)

        return read


@pytest.mark.parametrize("home", HOMES)
def test_pages_that_hold_no_chosen_token_are_not_touched(home, monkeypatch):
    k, v = random(80)
    pages = paged(k, v, home)
    seen = Touched(monkeypatch)
    at = torch.tensor([17, 18, 31, 64, 64, 16]).expand(BATCH, HEADS, -1)
    wanted = torch.ones_like(at, dtype=torch.bool)
    wanted[..., 3:5] = False
    got, _ = pages.take(at, wanted)
    assert torch.equal(got[wanted], k.gather(2, at[..., None].expand(-1, -1, -1, DIM))[wanted])
    assert dict(seen.parts) == {id(pages.entries[1].page): 1}
    pages.take(at)
    assert dict(seen.parts) == {id(pages.entries[1].page): 2, id(pages.entries[4].page): 1}
    assert home == "host" or not seen.whole, "a file is mapped and its tokens are read, no checksum of all of it"
    got, _ = pages.take(at, torch.zeros_like(wanted))
    assert got.shape == (BATCH, HEADS, 6, DIM) and sum(seen.parts.values()) == 3


@pytest.mark.parametrize("home", HOMES)
def test_take_in_several_segments_asks_pages_for_their_own(home, monkeypatch):
    k, v = random(50)
    seen = Touched(monkeypatch)
    segments = [paged(k[:, :, :40], v[:, :, :40], home), plain(k[:, :, 40:], v[:, :, 40:])]
    at = torch.tensor([1, 45, 49]).expand(BATCH, HEADS, -1)
    got, _ = take(segments, at)
    assert torch.equal(got, k.gather(2, at[..., None].expand(-1, -1, -1, DIM)))
    assert dict(seen.parts) == {id(segments[0].entries[0].page): 1}


@pytest.mark.parametrize("home", HOMES)
def test_parts_of_pages_and_changed_rows(home):
    """Beams choose the rows of older pages by an index; a sequence alone begins inside of a page."""
    k, v = random(48, batch=3)
    pages = paged(k, v, home)
    order = torch.tensor([2, 0, 0, 1])
    pages.map_rows(lambda x: x[order])
    k, v = k[order], v[order]
    more = random(16, batch=4)
    pages.entries.append(Entry(HOMES[home]().write(*more), 0, 16))
    k, v = torch.cat([k, more[0]], 2), torch.cat([v, more[1]], 2)
    whole = slice(None)
    for rows, start, end in ((whole, 0, 64), (whole, 5, 64), (slice(1, 2), 21, 60), (slice(3, 4), 32, 33)):
        own = pages.first(end).alone(rows, start)
        a, b = k[rows, :, start:end], v[rows, :, start:end]
        assert own.form == (a.shape[0], HEADS, DIM) and own.length == end - start
        at = torch.randint(0, end - start, (a.shape[0], HEADS, 9))
        for x, want in zip(own.take(at), (a, b), strict=True):
            assert torch.equal(x, want.gather(2, at[..., None].expand(-1, -1, -1, DIM)))
        for low, high in ((0, end - start), ((end - start) // 2, end - start)):
            for x, want in zip(own.span(low, high), (a, b), strict=True):
                assert torch.equal(x, want[:, :, low:high])


@pytest.mark.parametrize("how", ["written over", "shortened", "gone"])
def test_a_page_file_that_is_no_longer_what_was_written_is_refused(how):
    pages = paged(*random(32), "disk")
    path = pages.entries[1].page.path
    if how == "written over":
        other = paged(*random(16), "disk").entries[0].page
        data = Path(other.path).read_bytes()
        assert len(data) == os.path.getsize(path)
        Path(path).write_bytes(data)
        os.utime(path, ns=(0, 0))
    elif how == "shortened":
        with open(path, "r+b") as file:
            file.truncate(60)
    else:
        os.unlink(path)
    at = torch.full((BATCH, HEADS, 1), 3)
    pages.take(at)
    with pytest.raises(CacheError, match=r"page file .*1\.safetensors of this cache .*cache.reset\(\)"):
        pages.take(at + 16)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_tokens_that_are_not_chosen_are_not_unpacked(bits):
    made = packed((BATCH, HEADS, 1, DIM), 64, bits, 16, dtype=torch.float32)
    k, v, _ = numbers_of(made)
    at = torch.tensor([20, 16, 31]).expand(BATCH, HEADS, -1)
    rest = torch.ones(64, dtype=torch.bool)
    rest[at[0, 0]] = False
    made.v_scale[:, :, torch.cat([rest, torch.ones(made.slots - 64, dtype=torch.bool)])] = torch.nan
    made.k_scale[:, :, [0, 2, 3]] = torch.nan
    for x, want in zip(made.take(at), (k, v), strict=True):
        want = want.gather(2, at[..., None].expand(-1, -1, -1, DIM))
        torch.testing.assert_close(x.double(), want, rtol=1e-6, atol=1e-6)
    for low, high in ((16, 32), (20, 21), (17, 31)):
        torch.testing.assert_close(made.span(low, high)[0].double(), k[:, :, low:high], rtol=1e-6, atol=1e-6)
