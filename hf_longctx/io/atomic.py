"""Files and folders that are there whole or not at all, whenever the process is killed; locks that end with theirs."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

UNFINISHED = ".unfinished"
WAIT = 0.1  # seconds between two looks at a lock


@contextmanager
def written_whole(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """Where to write what becomes ``path`` in one step when the block ends, and is on the disk then.

    A kill leaves the file of before, and at most ``.NAME.xxxxxxxxxxxxxxxx.unfinished`` beside it, which the next call
    for the same path removes. The folder is made if it is not there.

    Args:
        mode: who may read and write the file, less what the umask takes away; that of a file it replaces is lost.

    Raises:
        OSError: it cannot be written; the file of before is as it was. So is a folder, a pipe or a device.
    """
    check_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in left_over(path):
        with suppress(OSError), open(left, "rb", opener=_no_pipe) as file:  # somebody else removed it
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode) and lock(file, alone=True):
                left.unlink()
    unfinished, held = _fresh(path, mode)
    try:
        yield unfinished
        with unfinished.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)  # it is no longer there once it has become the file
        held.close()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Only one process at a time is inside, for the same path; others wait, and one that is killed waits no more.

    The lock is ``.NAME.lock`` beside the path, which stays. The folder is made if it is not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "ab") as held:
        while not lock(held, alone=True):
            time.sleep(WAIT)
        yield


@contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """An empty folder, which becomes ``path`` in one step when the block ends, with its files on the disk; inside of
    ``alone(path)``.

    A folder that is there stays until then. A kill leaves it, or none, and unfinished ones beside it, which the next
    call removes.

    Raises:
        OSError: it cannot be written, or something is there that is no folder.
    """
    if os.path.exists(path) and not path.is_dir():
        raise FileExistsError(errno.EEXIST, "there is something that is no folder", str(path))
    unfinished, before = (path.with_name(f".{path.name}.{secrets.token_hex(8)}{UNFINISHED}") for _ in range(2))
    unfinished.mkdir()
    try:
        yield unfinished
        for file in unfinished.iterdir():
            with file.open("rb+") as written:
                os.fsync(written.fileno())
        _sync_folder(unfinished)
        if path.exists():
            os.replace(path, before)
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    finally:
        for left in left_over(path):
            shutil.rmtree(left, ignore_errors=True)


def check_place(path: Path) -> None:
    """Raise FileExistsError where something is that is no file; root would replace even a device by one."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise FileExistsError(errno.EEXIST, "there is a folder, a pipe or a device", str(path))


def left_over(path: Path) -> list[Path]:
    """Unfinished files or folders of ``path``: of writers that were killed, and of those that write now."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}{re.escape(UNFINISHED)}")
    return sorted(entry for entry in path.parent.iterdir() if name.fullmatch(entry.name))


def _no_pipe(path: str, flags: int) -> int:
    """Opens what anybody may have put there: a pipe without waiting for its other end, and no link."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))


def _fresh(path: Path, mode: int) -> tuple[Path, IO]:
    """A new unfinished file, locked so that no other writer takes it for that of a killed one."""
    while True:
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}{UNFINISHED}")
        held = open(unfinished, "xb", opener=partial(os.open, mode=mode))  # noqa: SIM115
        if fcntl is None:
            held.close()  # Windows renames no open file
            return unfinished, held
        lock(held, alone=True)
        with suppress(FileNotFoundError):  # another writer came between and removed it
            if os.path.samestat(os.fstat(held.fileno()), unfinished.stat()):
                return unfinished, held
        held.close()


def _sync_folder(folder: Path) -> None:
    """Put the folder's names on the disk, where the system lets one open a folder."""
    if fcntl is not None:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def lock(file: IO, alone: bool) -> bool:
    """Whether nobody else has the file locked; ``alone``: nobody can from now on. It ends with the process."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_NB | (fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
