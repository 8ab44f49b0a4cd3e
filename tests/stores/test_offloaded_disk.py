"""``store: offloaded_disk``: files that come and go, errors that leave a usable cache, memory within ``resident``."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.memory import Allocations
from helpers.paged_cases import full_model, paged_model, paged_stores, pages_of, read
from torch.utils._python_dispatch import _disable_current_modes

from hf_longctx import CacheError, ConfigError, LongCtxCache, UnsupportedModeError, patch_model, unpatch_model
from hf_longctx.layout.heads import RoleHeads
from hf_longctx.layout.rows import Rows
from hf_longctx.stores._page import DiskPage, Folder
from hf_longctx.stores.offloaded_disk import OffloadedDisk

ROOT = Path(__file__).parents[2]


def model_in(folder, **fields):
    return paged_model("offloaded_disk", fields={"folder": str(folder), **fields})


def files(folder) -> list[Path]:
    return sorted(Path(folder).rglob("*.safetensors"))


# Files.


def test_page_files_go_with_their_last_owner(tmp_path):
    model = model_in(tmp_path)
    cache = LongCtxCache(model)
    assert len(list(tmp_path.iterdir())) == 2 and not files(tmp_path), "a sub-folder for each layer with such heads"
    read(model, cache, torch.randint(3, 97, (1, 100)))
    assert len(files(tmp_path)) == 2 * 5
    fork, twin = cache.fork(), copy.deepcopy(cache)
    read(model, fork, torch.randint(3, 97, (1, 32)))
    assert len(files(tmp_path)) == 2 * 7
    cache.crop(33)
    assert len(files(tmp_path)) == 2 * 7, "the fork still reads them"
    del fork
    gc.collect()
    assert len(files(tmp_path)) == 2 * 5, "the twin still reads them"
    del twin
    gc.collect()
    assert len(files(tmp_path)) == 2 * 3
    cache.reset()
    assert len(files(tmp_path)) == 0 and len(list(tmp_path.iterdir())) == 2
    read(model, cache, torch.randint(3, 97, (1, 100)))
    last = paged_stores(cache)[1].fork()
    del cache
    gc.collect()
    assert len(files(tmp_path)) == 5
    del last
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_has_the_pages_in_it_and_writes_them_anew(tmp_path):
    model, plain = model_in(tmp_path), full_model()
    ids = torch.randint(3, 97, (1, 100))
    cache = LongCtxCache(model)
    read(model, cache, ids[:, :-1])
    data = pickle.dumps(cache)
    paged = sum(cache.nbytes_offloaded.values())
    assert paged < len(data) < cache.nbytes + paged + 40_000
    del cache
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    first, second = pickle.loads(data), pickle.loads(data)
    assert len(files(tmp_path)) == 2 * 2 * 4 and len(list(tmp_path.iterdir())) == 4
    for again in (first, second):
        want = read(plain, LongCtxCache(plain), ids)
        torch.testing.assert_close(read(model, again, ids[:, -1:]), want, rtol=0, atol=1e-6)


def run_python(code: str, *args: object, **kwargs) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "stores")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, **kwargs)


ENDS = """
    import os, signal, sys
    import torch
    from hf_longctx.layout.heads import RoleHeads
    from hf_longctx.layout.rows import Rows
    from hf_longctx.stores.offloaded_disk import OffloadedDisk

    folder, end = sys.argv[1:]
    store = OffloadedDisk(page=16, recent=0, folder=folder).new(RoleHeads("retrieval", (0, 1), 2), None)
    k = torch.randn(1, 2, 64, 8)
    store.append(k, k, Rows(1, 0, 64))
    count = lambda: sum(len(names) for _, _, names in os.walk(folder))
    assert count() == 4
    child = os.fork()
    if child == 0:
        del store
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert count() == 4, "the child deleted its parent's files"
    assert torch.equal(store.pages.contents()[0], k)
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("end", "code"), [("exit", 0), ("kill", -signal.SIGKILL)])
def test_files_are_gone_when_the_interpreter_ends(end, code, tmp_path):
    done = run_python(ENDS, tmp_path, end)
    assert done.returncode == code, done.stderr
    left = list(tmp_path.iterdir())
    if end == "kill":  # nobody could: all that is left is in the sub-folder, by its name
        assert len(left) == 1 and left[0].name.startswith("hf-longctx-") and len(files(tmp_path)) == 4
    else:
        assert left == []


# Errors.


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_folder_that_cannot_be_used_is_refused_before_anything_is_read(kind, tmp_path):
    folder = tmp_path / "pages"
    if kind == "a file":
        folder.write_text("")
    model = model_in(folder)
    with pytest.raises(
        CacheError, match="no folder for page files can be made in .*pages: .*Set stores.retrieval.folder"
    ):
        model.generate(torch.randint(3, 97, (1, 10)), max_new_tokens=2)
    folder.unlink(missing_ok=True)
    folder.mkdir()
    assert model.generate(torch.randint(3, 97, (1, 10)), max_new_tokens=2).shape == (1, 12)


@contextmanager
def largest_file(size: int):
    """What a full disk is to a writer: files end at ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("step", [1, 40])
def test_a_full_disk_leaves_a_cache_that_goes_on(step, tmp_path):
    model, plain = model_in(tmp_path), full_model()
    ids = torch.randint(3, 97, (1, 140))
    cache = LongCtxCache(model)
    read(model, cache, ids[:, :97])
    kept = files(tmp_path)
    with largest_file(1000), pytest.raises(CacheError, match="a page of 8192 bytes cannot be written to .*crop"):
        for at in range(97, 137, step):
            read(model, cache, ids[:, at : at + step])
    assert files(tmp_path) == kept, "nothing is left of what was not written"
    cache.crop(0)
    seen = cache.get_seq_length()
    assert seen == {1: 99, 40: 97}[step], "what was read before stays read"
    got = read(model, cache, ids[:, seen:])
    torch.testing.assert_close(got, read(plain, LongCtxCache(plain), ids), rtol=0, atol=1e-6)


def test_the_second_layer_may_fail_as_well(tmp_path, monkeypatch):
    model, plain = model_in(tmp_path), full_model()
    ids = torch.randint(3, 97, (1, 200))
    cache = LongCtxCache(model)
    read(model, cache, ids[:, :99])
    write, calls = Folder.write, []

    def failing(self, k, v):
        calls.append(self.path)
        if len(calls) == 5:  # two pages of the first layer, then the third of the second
            with largest_file(100):
                return write(self, k, v)
        return write(self, k, v)

    monkeypatch.setattr(Folder, "write", failing)
    with pytest.raises(CacheError, match="cannot be written"):
        read(model, cache, ids[:, 99:140])
    assert [layer.seen for layer in cache.layers] == [140, 99] and len(set(calls)) == 2
    with pytest.raises(CacheError, match="an earlier forward was interrupted. Call cache.crop"):
        read(model, cache, ids[:, 99:140])
    cache.crop(0)
    got = read(model, cache, ids[:, 99:])
    torch.testing.assert_close(got, read(plain, LongCtxCache(plain), ids), rtol=0, atol=1e-6)


def test_a_page_file_that_somebody_deleted_is_an_error(tmp_path):
    model = model_in(tmp_path)
    cache = LongCtxCache(model)
    read(model, cache, torch.randint(3, 97, (1, 100)))
    files(tmp_path)[0].unlink()
    with pytest.raises(CacheError, match="cannot be read: .*Call cache.reset"):
        read(model, cache, torch.randint(3, 97, (1, 1)))
    cache.reset()
    read(model, cache, torch.randint(3, 97, (1, 100)))


def test_a_file_cut_short_is_an_error(tmp_path):
    model = model_in(tmp_path)
    cache = LongCtxCache(model)
    read(model, cache, torch.randint(3, 97, (1, 100)))
    file = files(tmp_path)[0]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CacheError, match="cannot be read: .*Call cache.reset"):
        read(model, cache, torch.randint(3, 97, (1, 1)))


@pytest.mark.parametrize("how", ["another number", "another file", "numbers in another order"])
def test_a_page_that_was_changed_while_its_cache_lives_is_an_error(how, tmp_path):
    model = model_in(tmp_path)
    cache = LongCtxCache(model)
    read(model, cache, torch.randint(3, 97, (1, 100)))
    first, second = files(tmp_path)[:2]
    whole = first.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    changed = {
        "another number": whole[:-1] + bytes([whole[-1] ^ 1]),
        "another file": second.read_bytes(),
        "numbers in another order": whole[:header] + whole[header:][8:] + whole[header : header + 8],
    }[how]
    assert changed != whole, "a control"
    first.write_bytes(changed)
    with pytest.raises(CacheError, match="page file .* is not what was written to it. Nobody may touch .*cache.reset"):
        read(model, cache, torch.randint(3, 97, (1, 1)))
    first.write_bytes(whole)
    cache.crop(0)
    assert read(model, cache, torch.randint(3, 97, (1, 1))).isfinite().all(), "a control: the page as it was"


# Bounded memory.


def test_too_little_for_one_page_says_the_smallest_that_works(tmp_path):
    slot = 3 * 4 * 2 * 8 * 8  # rows, KV heads, k and v, head_dim, float64
    ids = torch.randint(3, 97, (3, 60))
    smallest = max(2 * (20 + 16), 20 + 16 + 4 * 16) * slot
    model = model_in(tmp_path, resident=smallest - 1)
    message = f"a layer of 3 rows needs {smallest} .* at least {smallest}, or recent to at most 19"
    with pytest.raises(CacheError, match=message):
        read(model, LongCtxCache(model), ids)
    assert files(tmp_path) == []
    read(model, cache := LongCtxCache(model), ids[:2])
    with pytest.raises(CacheError, match="a layer of 4 rows needs"):
        cache.batch_repeat_interleave(2)
        read(model, cache, ids[:1].repeat(4, 1))
    works = model_in(tmp_path, resident=smallest)
    read(works, LongCtxCache(works), ids)
    less = paged_model("offloaded_disk", recent=19, fields={"folder": str(tmp_path), "resident": smallest - 1})
    read(less, LongCtxCache(less), ids)
    tiny = model_in(tmp_path, resident=1)
    with pytest.raises(CacheError, match="or make page smaller"):
        read(tiny, LongCtxCache(tiny), ids)


def test_a_pattern_may_read_all_pages_only_where_they_fit(tmp_path):
    prefill = {"min_tokens": 0, "retrieval": {"pattern": "vertical_slash", "vertical": 9999, "slash": 9999}}
    slot = 4 * 2 * 8 * 8
    resident = 2 * 515 * slot
    fields = {"folder": str(tmp_path), "resident": resident}
    ids = torch.randint(3, 97, (1, 1100))
    for seen, fits in ((515, True), (516, False)):
        model = paged_model("offloaded_disk", prefill=prefill, fields=fields, recent=16)
        cache = LongCtxCache(model)
        read(model, cache, ids[:, :seen])
        if fits:
            read(model, cache, ids[:, seen : seen + 200])
            continue
        with pytest.raises(UnsupportedModeError, match=f"takes {resident + 2 * slot} bytes here; .* hold {resident}"):
            read(model, cache, ids[:, seen : seen + 200])
        cache.crop(0)
        read(model, cache, ids[:, seen : seen + 100])  # too short for the pattern, so dense


class Memory(Allocations):
    """Counts page files while they are mapped as well."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.mapped, read_file = 0, DiskPage.read

        def watched(page):
            with _disable_current_modes():  # safetensors makes them of tensors of its own, in some versions
                k, v = read_file(page)
            self.mapped += 1
            self.live += page.nbytes
            self.peak = max(self.peak, self.live)
            for x in (k, v):
                self.known.add(x.untyped_storage()._cdata)
                weakref.finalize(x.untyped_storage(), self._gone, x.untyped_storage()._cdata, x.nbytes)
            return k, v

        monkeypatch.setattr(DiskPage, "read", watched)


@pytest.mark.spanning
@pytest.mark.parametrize("heads", [(0, 1, 2, 3), (0, 2)])
@pytest.mark.parametrize("chunk", [7, 64, 200])
def test_memory_of_a_store_stays_within_resident(heads, chunk, tmp_path, monkeypatch):
    """Buffer, mapped pages and their copies, over 64 times as much; what a forward itself brings is not in it."""
    spec = OffloadedDisk(page=32, recent=40, folder=str(tmp_path))
    slot = 2 * len(heads) * 2 * 8 * 4
    resident, tokens = spec.needed(slot), 0
    monkeypatch.undo()  # memory that is filled with NaN is allocated twice
    made = Memory(monkeypatch)
    store = spec.new(RoleHeads("retrieval", heads, 4), None)
    new = torch.randn(2, 4, chunk, 8)
    most, swap, turns = 0, torch.tensor([1, 0]), 0
    with torch.no_grad(), made:
        while store.paged * slot < 64 * resident:
            k, v = new * (tokens + 1), new - tokens
            brought = k.nbytes + v.nbytes
            made.peak = made.live
            store.append(k, v, Rows(2, tokens, chunk))
            tokens += chunk
            copied = 0 if len(heads) == 4 or chunk == 1 else brought  # heads that are no neighbours are copied together
            assert made.peak - brought <= resident + copied
            if store.paged * slot > turns * 8 * resident:
                turns += 1
                made.peak = made.live
                assert sum(block.length for block in store.pages.blocks() if block.k.numel()) == store.paged
                assert made.peak - brought <= resident
                most = max(most, made.peak - brought)
                store.map_rows(lambda x: x[swap])
    assert turns in (8, 9) and made.mapped > 500 and most > resident / 2, "a control: something was counted"
    assert sum(t.nbytes for t in store.tensors()) < resident
    assert store.pages.nbytes >= 64 * resident


LIMITED = """
    import resource, sys
    import torch
    from hf_longctx.kernels import cpu
    from hf_longctx.kernels.base import attend
    from hf_longctx.layout.forward import Forward
    from hf_longctx.layout.reads import ALL
    from hf_longctx.layout.scores import Scores
    from hf_longctx.layout.heads import RoleHeads
    from hf_longctx.kernels.reference import merge
    from hf_longctx.config.words import build
    from hf_longctx.layout.rows import Rows

    torch.set_num_threads(1)
    word, folder, tokens, step = sys.argv[1], sys.argv[2], int(sys.argv[3]), 2048
    fields = {"page": 256, "recent": 256} if word != "full" else {}
    if word == "offloaded_disk":
        fields |= {"folder": folder, "resident": int(sys.argv[4])}
    heads = RoleHeads("retrieval", tuple(range(8)), 8)
    store = build("stores", {"store": word, **fields}, "store", "").new(heads, None)

    def attention(q, segments, rows):
        return attend("cpu", q, segments, ALL, Scores(1.0), Forward(rows))[0]

    def tokens_at(past):
        torch.manual_seed(past)
        return torch.randn(2, 1, 8, step, 64, dtype=torch.float64).unbind()

    torch.manual_seed(1)
    q, parts = torch.randn(1, 8, 1, 64, dtype=torch.float64) * 0.3, None
    first = store.append(*tokens_at(0), Rows(1, 0, step)).segments[-1:]
    attention(q, first, Rows(1, 0, step))  # warm: libraries are loaded
    in_use = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
    # A quarter of the context. glibc gives a thread that allocates 64 MiB of addresses, or does not: by chance.
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 192 * 2**20,) * 2)
    try:
        for past in range(step, tokens, step):
            store.append(*tokens_at(past), Rows(1, past, step))
    except (RuntimeError, MemoryError) as error:
        print("out of memory")
        sys.exit(0)
    new = [x[:, :, :1] for x in tokens_at(tokens)]
    got = attention(q, store.append(*new, Rows(1, tokens, 1)).segments, Rows(1, tokens, 1))
    if word == "offloaded_disk":
        assert store.pages.nbytes >= 64 * int(sys.argv[4]), (store.pages.nbytes, sys.argv[4])
    for past in range(0, tokens + step, step):  # the same from the tokens themselves
        k, v = tokens_at(past) if past < tokens else new
        scores = q @ k.transpose(-1, -2)
        part = (scores.softmax(-1) @ v, scores.logsumexp(-1))
        parts = part if parts is None else merge([parts, part])
    print("error", (got - parts[0]).abs().max().item())
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and limits the address space")
@pytest.mark.parametrize("word", ["offloaded_disk", "full"])
def test_a_context_of_64_times_resident_in_a_process_that_cannot_hold_it(word, tmp_path):
    slot = 8 * 2 * 64 * 8
    resident = OffloadedDisk(page=256, recent=256).needed(slot)
    tokens = 2048 * -(-(64 * resident // slot + 512) // 2048)
    assert tokens * slot > 4 * 192 * 2**20
    done = run_python(LIMITED, word, tmp_path, tokens, resident)
    assert done.returncode == 0, done.stderr
    said = done.stdout.split()
    if word == "offloaded_disk":
        assert said[0] == "error" and float(said[1]) < 1e-12
    else:
        assert said == ["out", "of", "memory"]
    assert list(tmp_path.iterdir()) == []


def test_chunked_reading_of_a_long_prompt_equals_the_full_store(tmp_path):
    """With resident at its smallest, all layers of a model, and streaming heads beside."""
    model, plain = (make(roles="mixed") for make in (lambda roles: paged_model("offloaded", roles), full_model))
    slot = 2 * 2 * 8 * 8
    fields = {"folder": str(tmp_path), "resident": max(2 * 36, 100) * slot}
    disk = paged_model("offloaded_disk", roles="mixed", fields=fields)
    ids, out = torch.randint(3, 97, (1, 1500)), {}
    for name, one in (("disk", disk), ("host", model), ("full", plain)):
        cache = LongCtxCache(one)
        for chunk in ids.split(100, 1):
            out[name] = read(one, cache, chunk)
        assert name == "full" or cache.nbytes_dense > 1.5 * sum(cache.nbytes_offloaded.values()) > 0
        if name == "disk":
            held = [sum(t.nbytes for t in store.tensors()) for store in paged_stores(cache)]
            assert max(held) <= fields["resident"] < cache.nbytes_dense / 8
    assert (out["full"] - out["disk"]).abs().max() < 1e-6
    assert (out["full"] - out["host"]).abs().max() < 1e-6


def test_the_words_fields_are_checked():
    model = full_model()
    for fields, message in (
        ({"page": 15}, "stores.retrieval.page: got 15, expected a whole number, at least 16"),
        ({"recent": -1}, "stores.retrieval.recent: got -1"),
        ({"resident": 0}, "stores.retrieval.resident: got 0"),
        ({"folder": 3}, "stores.retrieval.folder: got 3, expected text"),
    ):
        with pytest.raises(ConfigError, match=message):
            patch_model(model, model.config.longctx, stores={"retrieval": {"store": "offloaded_disk", **fields}})


def test_auto_keeps_a_folder_given_in_this_process_and_takes_none_that_came_with_the_model(tmp_path):
    model = model_in(tmp_path)
    folder = patch_model(model).config.longctx["stores"]["retrieval"]["folder"]
    assert folder == str(tmp_path)
    patch_model(model, stores={"streaming": {"recent": 9}})
    assert model.config.longctx["stores"]["streaming"]["recent"] == 9
    came = full_model()
    came.config.longctx = model.config.longctx
    with pytest.raises(ConfigError, match="may name no path"):
        patch_model(came)
    fresh = unpatch_model(full_model())
    fresh.config.longctx = model.config.longctx
    with pytest.raises(ConfigError, match="may name no path"):
        patch_model(fresh)


def test_pages_of_a_cache_are_told_apart():
    assert pages_of(LongCtxCache(full_model())) == []
