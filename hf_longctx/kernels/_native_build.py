"""Compiles the C++ of the native kernel once and keeps the library in the user's own cache folder.

The library is made for this CPU (``-march=native``): one plain source instead of a version per instruction set, and the
compiler may use all the CPU has. ``HF_LONGCTX_NATIVE_ARCH`` (``avx2`` or ``avx512``) makes it for less than that, to
test and to measure here what other CPUs run. So its name holds a hash of the sources, the command and every macro the
compiler defines for it, which are its own version and the CPU features it found, asked anew by every process: a home
that machines share, or a folder that moved, holds one library for each kind of CPU. The name also holds a hash of the
library itself, so a damaged file is seen before it is loaded.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where `library` declines
    fcntl = None

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "_native"
COMPILERS = ("c++", "g++", "clang++")
# No -ffast-math, which reorders the sums and drops NaN. These three change no finite result but a fused a * b + c.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread")
FLAGS += ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
INSTRUCTIONS = re.compile(rb"#define __((?:AVX|BMI|F16C|FMA|LZCNT|MOVBE|SSE)\w*?)__ 1\b")
CPU_FLAGS = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler takes
ARCH = "HF_LONGCTX_NATIVE_ARCH"
LEVELS = {"avx2": "x86-64-v3", "avx512": "x86-64-v4"}  # the second without products of bytes and of bfloat16
PATIENCE = 180  # seconds to wait for another process's compiler, or for the own


class BuildError(Exception):
    """There is no library; the message says why, as the rest of a sentence."""


class ArchError(Exception):
    """The environment asks for instructions that are unknown, or that this CPU lacks; the message is a sentence."""


def library() -> Path:
    """The compiled library, from the cache folder or compiled now.

    Raises:
        BuildError: no compiler, no safe cache folder, or the compiler failed.
        ArchError: ``HF_LONGCTX_NATIVE_ARCH`` is unknown, or asks for instructions that this CPU lacks.
    """
    if fcntl is None:
        raise BuildError(f"it is compiled on Linux and macOS only, not on {sys.platform}")
    command, macros = _compiler()
    _check_arch(command, macros)
    folder = cache_folder()
    parts = [path.name.encode() + b"\0" + path.read_bytes() for path in sorted(SOURCES.iterdir())]
    key = _digest(b"\0".join([*parts, "\0".join(command).encode(), macros]))
    found = _find(folder, key)
    if found is None:
        with _lock(folder / "lock"):
            found = _find(folder, key) or _compile(command, folder, key)
    return found


def cache_folder() -> Path:
    """``hf_longctx`` in ``$XDG_CACHE_HOME`` or ``~/.cache``, made if missing; nobody else may enter it.

    Raises:
        BuildError: it cannot be made, belongs to somebody else, or others could have put a library there.
    """
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = (asked if asked.is_absolute() else Path.home() / ".cache") / "hf_longctx"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A link that somebody else made may lead to any folder of one's own; who can write above can rename. What is
        # checked is the folder that links lead to now, and that is the one to use.
        mine = folder.lstat().st_uid == os.getuid()
        folder = folder.resolve()
        if not mine or not _own(folder.stat()) or any(_others_can_rename(above.stat()) for above in folder.parents):
            raise BuildError(f"others can write to {folder}: remove it, or set XDG_CACHE_HOME to a folder of your own")
        if stat.S_IMODE(folder.stat().st_mode) != 0o700:
            folder.chmod(0o700)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise BuildError(f"the cache folder cannot be used ({error}): set XDG_CACHE_HOME to another one") from error
    return folder


def _others_can_rename(status: os.stat_result) -> bool:
    """Whether anybody but this user and root may rename what lies in this folder.

    Its owner may, and whoever may write to it, the sticky bit aside.
    """
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
    return status.st_uid not in (0, os.getuid()) or bool(writable)


def _own(status: os.stat_result) -> bool:
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _compiler() -> tuple[list[str], bytes]:
    """The command without files, and the macros it defines for this CPU."""
    try:
        asked = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX cannot be read ({error})") from error
    names = [asked[0]] if asked else COMPILERS
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise BuildError(f"there is no C++ compiler (looked for {', '.join(names)}): install g++, or set CXX")
    for cpu in _cpu_flags():
        command = [found, *asked[1:], *FLAGS, *cpu]
        done = _macros(command)
        if done.returncode == 0:
            return command, done.stdout
    raise BuildError(f"{found} failed: {_last_line(done)}")


def _cpu_flags() -> tuple[tuple[str, ...], ...]:
    """Flags for the CPU, of which the first that the compiler takes are used."""
    asked = os.environ.get(ARCH)
    if asked is None:
        return CPU_FLAGS
    if asked not in LEVELS:
        raise ArchError(f"{ARCH} is {' or '.join(LEVELS)}, or unset for all that this CPU has, given {asked!r}.")
    return ((f"-march={LEVELS[asked]}", "-mtune=native"),)


def _macros(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """The macros that the compiler defines with these flags."""
    return _run([*command, "-dM", "-E", "-x", "c++", os.devnull])


def _check_arch(command: Sequence[str], macros: bytes) -> None:
    """Refuse instructions that this CPU lacks: the first of them would end the process.

    Raises:
        ArchError: the CPU lacks some.
    """
    if (asked := os.environ.get(ARCH)) is None:
        return
    plain = [flag for flag in command if not flag.startswith(("-march", "-mtune"))]
    own, wanted = (set(INSTRUCTIONS.findall(text)) for text in (_macros([*plain, *CPU_FLAGS[0]]).stdout, macros))
    if lacking := sorted(name.decode() for name in wanted - own):
        raise ArchError(f"{ARCH}={asked}: this CPU lacks {', '.join(lacking)}. Unset it to use all that the CPU has.")


def _compile(command: list[str], folder: Path, key: str) -> Path:
    log.info("compiling the native kernel into %s, once", folder)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = Path(place) / "library.so"
            done = _run([*command, f"-DHF_LONGCTX_KEY={key}", str(SOURCES / "native.cpp"), "-o", str(made)])
            if done.returncode:
                raise BuildError(f"{command[0]} failed: {_last_line(done)}")
            made.chmod(0o700)
            into = folder / f"native-{key}-{_digest(made.read_bytes())}.so"
            os.replace(made, into)
    except OSError as error:
        raise BuildError(f"the library cannot be written ({error})") from error
    return into


def _find(folder: Path, key: str) -> Path | None:
    """The library of this key, if there is one and it is whole; what is not is removed."""
    for path in sorted(folder.glob(f"native-{key}-*.so")):
        with suppress(OSError):
            if _own(path.stat()) and path.stem.rsplit("-", 1)[1] == _digest(path.read_bytes()):
                return path
            log.warning("the compiled native kernel %s is damaged, it is compiled anew", path)
            path.unlink(missing_ok=True)
    return None


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One compiler at a time. It only saves work: two would write the same file, each in one step."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BuildError(f"the cache folder cannot be written ({error})") from error
    try:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(handle)


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    """In a session of its own, so that what a wrapper started ends with it when it takes too long."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        with subprocess.Popen(command, start_new_session=True, **streams) as process:
            try:
                out, error = process.communicate(timeout=PATIENCE)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                with suppress(OSError):  # it has just ended by itself
                    os.killpg(process.pid, signal.SIGKILL)
                raise
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} failed: {error}") from error
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def _last_line(done: subprocess.CompletedProcess[bytes]) -> str:
    """The first error of a compiler, or the last it said."""
    lines = done.stderr.decode(errors="replace").splitlines() or [f"exit status {done.returncode}"]
    return next((line for line in lines if "error" in line), lines[-1])


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
