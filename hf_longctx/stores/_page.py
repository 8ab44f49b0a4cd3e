"""Pages: runs of kept tokens outside of the device, in host memory or in files.

A page is written once and never again, so forks, copies and shorter caches share it by reference; its memory or its
file goes with its last owner. Shapes: ``B`` rows when the page was written, ``n`` KV heads, ``D`` head_dim.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CacheError
from ..io.tensor_file import checksum

MAPS = 1 << 15  # files that are mapped at once: half of what a process may map, as Linux is set up
_maps: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # page -> its keys and values, in a file

GONE = "Nobody may touch page files while their cache lives. Call cache.reset() and read the prompt again."


class Page(ABC):
    """Keys and values of consecutive slots of every row; nobody changes them.

    Attributes:
        rows, tokens: B and the number of slots.
        form: n and D.
        nbytes: what they take.
    """

    rows: int
    tokens: int
    form: tuple[int, int]
    nbytes: int

    @abstractmethod
    def read(self) -> tuple[Tensor, Tensor]:
        """k, v ``[B, n, tokens, D]`` on the CPU."""

    def read_at(self, rows: Tensor, heads: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """k, v ``[N, D]`` of N tokens, each of its row, KV head and slot (int64 ``[N]``), on the CPU."""
        self.settle()
        return tuple(x[rows, heads, slots] for x in self.read())

    def mapped(self) -> tuple[Tensor, Tensor]:
        """k, v ``[B, n, tokens, D]`` on the CPU, of which a few tokens are read: no more than those need be fetched."""
        self.settle()
        return self.read()

    def soon(self) -> None:  # noqa: B027
        """A hint that `read` comes next."""

    def settle(self) -> None:  # noqa: B027
        """Wait until it is written: for readers on the CPU."""

    def tensors(self) -> Iterator[Tensor]:
        """What it holds in memory."""
        yield from ()

    def __deepcopy__(self, memo: dict) -> Page:
        return self


class HostPage(Page):
    """A page in host memory, pinned where it came from a GPU."""

    def __init__(self, k: Tensor, v: Tensor, written: torch.cuda.Event | None = None):
        self.k = k
        self.v = v
        self.written = written
        self.rows, self.tokens, self.form = k.shape[0], k.shape[2], (k.shape[1], k.shape[3])
        self.nbytes = k.nbytes + v.nbytes

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.k, self.v)

    def settle(self) -> None:
        if self.written is not None:
            self.written.synchronize()

    def __reduce__(self) -> tuple:
        self.settle()
        return _unpickled_host_page, (self.k, self.v, self.k.is_pinned())


class HostMemory:
    """Writes pages to host memory."""

    place = "in host memory"

    def write(self, k: Tensor, v: Tensor) -> HostPage:
        """A page of k, v ``[B, n, T, D]``."""
        pinned = k.is_cuda
        with torch.inference_mode(False):  # so that the cache can be continued outside of inference mode
            own = [torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned) for x in (k, v)]
        for into, x in zip(own, (k, v), strict=True):
            into.copy_(x.detach(), non_blocking=pinned)
        return HostPage(*own, written=torch.cuda.current_stream(k.device).record_event() if pinned else None)


class DiskPage(Page):
    """A page in a safetensors file, mapped into memory while somebody reads it.

    Its checksum is compared whenever all of it is read: disks rot, and a file in a folder for temporary ones is easily
    written over. Where a few tokens are read, it must be the file that was written, by its size and time. A file kept
    open and without a name would be one open file for each page, of which a long context has more than a process may
    have.
    """

    def __init__(self, path: str, folder: Folder, k: Tensor, v: Tensor):
        self.path = path
        self.folder = folder
        self.written = [_form(x) for x in (k, v)]
        self.stamp = _stamp(path)
        self.rows, self.tokens, self.form = k.shape[0], k.shape[2], (k.shape[1], k.shape[3])
        self.nbytes = k.nbytes + v.nbytes
        weakref.finalize(self, _delete, path, os.getpid())

    def read(self) -> tuple[Tensor, Tensor]:
        found = self._mapped()
        if [_form(x) for x in found] != self.written:
            self._refuse()
        return found

    def read_at(self, rows: Tensor, heads: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(x[rows, heads, slots] for x in self.mapped())

    def mapped(self) -> tuple[Tensor, Tensor]:
        if _stamp(self.path) != self.stamp:
            self._refuse()
        found = _maps.pop(self, None) or self._mapped()
        _maps[self] = found  # the last one in is the last one out
        while len(_maps) > MAPS:
            _maps.pop(next(iter(_maps)), None)
        return found

    def _mapped(self) -> tuple[Tensor, Tensor]:
        try:
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor("k"), file.get_tensor("v")
        except (OSError, SafetensorError) as error:
            raise CacheError(f"the page file {self.path} of this cache cannot be read: {error}. {GONE}") from error

    def _refuse(self) -> NoReturn:
        raise CacheError(f"the page file {self.path} of this cache is not what was written to it. {GONE}")

    def soon(self) -> None:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # only a hint; `read` has the error
                file = os.open(self.path, os.O_RDONLY)
                try:
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(file)

    def __reduce__(self) -> tuple:
        return _unpickled_disk_page, (self.folder, *(x.clone() for x in self.read()))


class Folder:
    """A sub-folder for the page files of one store. It goes with the last of them and of the stores that write to it.

    Args:
        parent: where it is made; None: the system's folder for temporary files.

    Raises:
        CacheError: nothing can be written there.
    """

    place = "on disk"

    def __init__(self, parent: str | None):
        self.parent, self.numbers = parent, itertools.count()
        try:
            self.path = tempfile.mkdtemp(
                prefix="hf-longctx-", dir=None if parent is None else os.path.expanduser(parent)
            )
        except OSError as error:
            raise CacheError(
                f"no folder for page files can be made in {parent or tempfile.gettempdir()}: {error}. Set "
                "stores.retrieval.folder to a folder that exists and can be written to."
            ) from error
        weakref.finalize(self, _delete, self.path, os.getpid())

    def write(self, k: Tensor, v: Tensor) -> DiskPage:
        """A page of k, v ``[B, n, T, D]``.

        Raises:
            CacheError: the file cannot be written, because the disk is full for example; nothing is left of it.
        """
        path = os.path.join(self.path, f"{next(self.numbers)}.safetensors")
        try:
            k, v = (x.detach().cpu().contiguous() for x in (k, v))
            save_file({"k": k, "v": v}, path)
        except (OSError, SafetensorError) as error:
            _delete(path, os.getpid())
            raise CacheError(
                f"a page of {k.nbytes + v.nbytes} bytes cannot be written to {path}: {error}. Make room there and call "
                "cache.crop(0), which goes back to before this forward, or cache.reset(); or start anew with another "
                "stores.retrieval.folder."
            ) from error
        return DiskPage(path, self, k, v)

    def __deepcopy__(self, memo: dict) -> Folder:
        return self

    def __reduce__(self) -> tuple:
        return Folder, (self.parent,)


def _unpickled_host_page(k: Tensor, v: Tensor, pinned: bool) -> HostPage:
    return HostPage(*(x.pin_memory() if pinned and torch.cuda.is_available() else x for x in (k, v)))


def _unpickled_disk_page(folder: Folder, k: Tensor, v: Tensor) -> DiskPage:
    return folder.write(k, v)


def _form(x: Tensor) -> tuple:
    """What a tensor that is read again must have in common with the one that was written."""
    return x.dtype, x.shape, checksum(x)


def _stamp(path: str) -> tuple[int, int, int] | None:
    """What changes when a file is written again; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _delete(path: str, process: int) -> None:
    """Remove a file or a folder, in the process that made it: a forked child must not."""
    if os.getpid() != process:
        return
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):  # gone, or on Windows still mapped: then it goes with its folder
            os.unlink(path)
