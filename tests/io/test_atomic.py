"""A file is there whole or not at all, also when its writer is killed; what killed writers leave is removed."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.tiny import config_for, tiny_model

from hf_longctx import CacheError, LongCtxCache, patch_model
from hf_longctx.io.atomic import alone, folder_written_whole, left_over, lock, written_whole

KILLS, MOST = 20, 400

# Forks a writer for every line it reads: importing torch thirty times would take minutes.
WRITERS = """
    import os, signal, sys, time, torch
    from hf_longctx import AutoModelForCausalLM, LongCtxCache
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    torch.set_num_threads(1)
    caches = []
    for start in (3, 4):
        caches.append(LongCtxCache(model))
        with torch.no_grad():
            model((torch.arange(4000) % 90 + start)[None], past_key_values=caches[-1])
    for number, delay in enumerate(sys.stdin):
        writer = os.fork()
        if not writer:
            caches[number % 2].save(sys.argv[2])
            os._exit(0)
        if delay.strip():
            time.sleep(float(delay))
            os.kill(writer, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_the_file_of_before(tmp_path):
    model = tiny_model()
    patch_model(model, config_for(model))
    model.save_pretrained(tmp_path / "model")
    path, rng = tmp_path / "cache", random.Random(0)
    command = [sys.executable, "-c", textwrap.dedent(WRITERS), str(tmp_path / "model"), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writers:

        def writer(after: float | None) -> int:
            """The exit status of a new writer, killed after so many seconds."""
            writers.stdin.write("\n" if after is None else f"{after}\n")
            writers.stdin.flush()
            return int(writers.stdout.readline())

        assert writer(None) == 0  # once it has imported everything
        begun = time.monotonic()
        assert writer(None) == 0
        takes, now, kills, left, torn = time.monotonic() - begun, 1, 0, 0, []
        for number in range(2, MOST):
            # Kills before it writes and after show little: go on until some hit.
            if kills >= KILLS and left >= 3 and torn:
                break
            ended = writer(rng.uniform(0, 1.1 * takes))
            assert ended in (0, -signal.SIGKILL)
            found = LongCtxCache.load(path, model).ids[0, 0].item() - 3  # whole: load checks every byte
            assert found in ((now, number % 2) if ended else (number % 2,))
            now, unfinished = found, left_over(path)
            assert len(unfinished) <= 1, "the next save removes what the one before left"
            left += len(unfinished)
            kills += ended != 0
            torn += [size for file in unfinished if (size := file.stat().st_size) < path.stat().st_size]
        assert kills >= KILLS and left >= 3 and torn, "a control: some were killed while they wrote, and left a part"
        assert writer(None) == 0 and left_over(path) == []
        writers.stdin.close()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "model"]


def test_what_an_error_leaves(tmp_path):
    path = tmp_path / "folder" / "file"
    with written_whole(path) as unfinished:
        unfinished.write_text("old")
        assert unfinished.parent == path.parent and not path.exists()
    with pytest.raises(KeyboardInterrupt), written_whole(path) as unfinished:
        unfinished.write_text("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]


def test_only_what_killed_writers_left_is_removed(tmp_path):
    path = tmp_path / "a.b*"
    (tmp_path / ".a.b*.0123456789abcdef.unfinished").write_text("killed")
    others = (".a.bc.0123456789abcdef.unfinished", ".a.b*.xyz.unfinished", "a.b*.unfinished")
    for name in others:
        (tmp_path / name).write_text("of somebody else")
    with written_whole(path) as first:
        first.write_text("first")
        assert left_over(path) == [first]
        with written_whole(path) as second:
            second.write_text("second")
            assert first.exists(), "a writer that is still at work"
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == sorted([*others, path.name])


def test_a_pipe_or_a_link_among_what_was_left_stops_nobody(tmp_path):
    path, names = tmp_path / "file", [tmp_path / f".file.{digit * 16}.unfinished" for digit in "abc"]
    (tmp_path / "target").write_text("of somebody else")
    os.mkfifo(names[0])
    names[1].symlink_to(tmp_path / "target")
    names[2].symlink_to("/dev/zero")
    assert left_over(path) == names
    signal.alarm(20)  # a writer that waits for the pipe's other end would wait for good
    try:
        with written_whole(path) as unfinished:
            unfinished.write_text("whole")
    finally:
        signal.alarm(0)
    assert path.read_text() == "whole" and left_over(path) == names, "they are not ours"
    assert (tmp_path / "target").read_text() == "of somebody else"


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path):
        with pytest.raises(FileExistsError, match="a folder, a pipe or a device"), written_whole(path):
            raise AssertionError("never runs")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()


def test_who_may_read_the_file(tmp_path):
    before = os.umask(0o022)
    try:
        for name, given, wanted in (("plain", {}, 0o644), ("private", {"mode": 0o600}, 0o600)):
            (tmp_path / name).write_text("old")
            (tmp_path / name).chmod(0o666)
            with written_whole(tmp_path / name, **given) as unfinished:
                assert stat.S_IMODE(unfinished.stat().st_mode) == wanted, "from its first byte on"
                unfinished.write_text("new")
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == wanted
    finally:
        os.umask(before)


def test_a_writer_whose_file_was_taken_for_left_over_begins_anew(tmp_path, monkeypatch):
    path, taken = tmp_path / "file", []

    def late(file, alone: bool) -> bool:
        if not taken:
            taken.append(Path(file.name))
            taken[0].unlink()
        return lock(file, alone)

    monkeypatch.setattr("hf_longctx.io.atomic.lock", late)
    with written_whole(path) as unfinished:
        assert [unfinished] != taken
        unfinished.write_text("whole")
    assert path.read_text() == "whole" and os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_left_is_no_cache(tmp_path):
    model = tiny_model()
    patch_model(model, config_for(model))
    cache = LongCtxCache(model)
    with torch.no_grad():
        model(torch.arange(3, 90)[None], past_key_values=cache)
    cache.save(tmp_path / "cache")
    left = tmp_path / ".cache.0123456789abcdef.unfinished"
    left.write_bytes((tmp_path / "cache").read_bytes()[:-100])
    with pytest.raises(CacheError, match="only a part of one"):
        LongCtxCache.load(left, model)
    cache.save(tmp_path / "cache")
    assert not left.exists()


def fill(path: Path, text: str) -> None:
    with alone(path), folder_written_whole(path) as folder:
        (folder / "a").write_text(text)
        (folder / "b").write_text(text)


def texts(path: Path) -> list[str]:
    return [(path / name).read_text() for name in ("a", "b")]


def test_a_folder_becomes_another_in_one_step(tmp_path):
    path = tmp_path / "new" / "folder"
    fill(path, "first")
    with alone(path), folder_written_whole(path) as folder:
        (folder / "a").write_text("second")
        assert texts(path) == ["first", "first"]
    assert [one.name for one in path.iterdir()] == ["a"], "nothing of the folder of before"
    with pytest.raises(OSError, match="no more"), alone(path), folder_written_whole(path) as folder:
        (folder / "a").write_text("third")
        raise OSError("no more")
    assert (path / "a").read_text() == "second" and left_over(path) == []


def test_a_folder_takes_no_other_things_place(tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(FileExistsError, match="no folder"):
        fill(tmp_path / "file", "x")
    assert (tmp_path / "file").read_text() == "a file" and left_over(tmp_path / "file") == []


KILLED = """
    import os, pathlib, signal, sys
    from hf_longctx.io.atomic import alone, folder_written_whole
    path = pathlib.Path(sys.argv[1])
    with alone(path), folder_written_whole(path) as folder:
        (folder / "a").write_text("killed")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_of_a_folder_leaves_that_of_before(tmp_path):
    path = tmp_path / "folder"
    fill(path, "before")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert texts(path) == ["before", "before"] and len(left_over(path)) == 1
    fill(path, "after")  # nobody has the lock
    assert texts(path) == ["after", "after"] and left_over(path) == []


def test_only_one_is_inside(tmp_path):
    path, inside, seen = tmp_path / "folder", [], []

    def work(number: int) -> None:
        with alone(path):
            inside.append(number)
            seen.append(len(inside))
            time.sleep(0.05)
            inside.remove(number)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert seen == [1, 1, 1]
