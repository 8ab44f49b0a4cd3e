"""Where the native kernel's library lies, who may touch it, how it is made once, what happens where it cannot be."""

from __future__ import annotations

import logging
import os
import platform
import re
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.calls import dense

from hf_longctx.errors import ConfigError, UnsupportedModeError
from hf_longctx.kernels import _native_build as build
from hf_longctx.kernels import base as dispatch
from hf_longctx.kernels import cpu, native
from hf_longctx.layout.blocks import BlockList

CASE = {"device": torch.device("cpu"), "dtype": torch.float32, "head_dim": 64, "needs_grad": False}
# In another process, by its path: it needs nothing but the standard library, and torch takes seconds to import.
ALONE = f"""
import importlib.util, os, pathlib, sys
spec = importlib.util.spec_from_file_location("build", {build.__file__!r})
build = importlib.util.module_from_spec(spec)
"""
TINY = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A cache folder of its own, and a source that compiles at once."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "native.cpp").write_text(TINY)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return sources


@pytest.fixture
def fresh():
    """Nothing of this process has loaded the library yet, nor will have after the test."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()


def libraries():
    return sorted(build.cache_folder().glob("*.so"))


def compilers_run(monkeypatch):
    runs, real = [], build._compile
    monkeypatch.setattr(build, "_compile", lambda *a: runs.append(1) or real(*a))
    return runs


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names instruction sets of x86")
def test_the_instructions_that_are_asked_for(monkeypatch, fresh):
    widths = {}
    for asked in (None, *build.LEVELS):
        monkeypatch.setenv(build.ARCH, asked) if asked else monkeypatch.delenv(build.ARCH, raising=False)
        try:
            widths[asked] = native._load()[0].hf_longctx_width()
        except ConfigError as error:
            assert "this CPU lacks AVX512" in str(error)
        native._load.cache_clear()
    assert widths["avx2"] == 8
    assert widths.get("avx512", 16) == 16
    monkeypatch.setenv(build.ARCH, "sse9")
    with pytest.raises(ConfigError, match="HF_LONGCTX_NATIVE_ARCH is avx2 or avx512, or unset .* given 'sse9'"):
        native.supports(dispatch.Case(**CASE))


def test_instructions_that_the_cpu_lacks_are_refused(tiny, monkeypatch):
    made = build._macros
    bare = [flag for flags in build.CPU_FLAGS for flag in flags]

    def of_a_plain_cpu(command):
        done = made(command)
        return SimpleNamespace(returncode=0, stdout=b"", stderr=b"") if set(command) & set(bare) else done

    monkeypatch.setattr(build, "_macros", of_a_plain_cpu)
    monkeypatch.setattr(build, "INSTRUCTIONS", re.compile(rb"#define (__\w+__) 1\b"))
    monkeypatch.setattr(build, "LEVELS", {"plain": "x"})
    monkeypatch.setattr(build, "_cpu_flags", lambda: ((),))
    monkeypatch.setenv(build.ARCH, "plain")
    with pytest.raises(build.ArchError, match="HF_LONGCTX_NATIVE_ARCH=plain: this CPU lacks "):
        build.library()
    monkeypatch.delenv(build.ARCH)
    assert build.library().exists()


def test_the_library_is_compiled_once_into_a_private_folder(tiny, tmp_path, monkeypatch):
    runs = compilers_run(monkeypatch)
    first = build.library()
    assert build.library() == first
    assert len(runs) == 1
    folder = tmp_path / "cache" / "hf_longctx"
    assert first.parent == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {folder.stat().st_uid, first.stat().st_uid} == {os.getuid()}
    assert not first.stat().st_mode & 0o077
    assert sorted(path.name for path in folder.iterdir()) == sorted([first.name, "lock"])
    folder.chmod(0o755)
    assert build.library() == first
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_other_sources_flags_and_compilers_are_other_libraries(tiny, monkeypatch):
    paths = [build.library()]
    (tiny / "native.cpp").write_text(TINY.replace("42", "43"))
    paths.append(build.library())
    monkeypatch.setenv("CXX", "g++ -O1")
    paths.append(build.library())
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    paths.append(build.library())
    monkeypatch.setattr(build, "CPU_FLAGS", ((),))  # another CPU: other macros
    paths.append(build.library())
    assert len({path.name.split("-")[1] for path in paths}) == len(libraries()) == 5


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-9] + b"?" + data[-8:]])
def test_a_damaged_library_is_compiled_anew(tiny, damage, monkeypatch, caplog):
    path = build.library()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    runs = compilers_run(monkeypatch)
    again = build.library()
    assert len(runs) == 1
    assert libraries() == [again]
    assert again.stem.endswith(build._digest(again.read_bytes()))
    assert "damaged" in caplog.text


def test_a_library_or_folder_that_others_can_write_is_not_used(tiny, monkeypatch):
    path = build.library()
    path.chmod(0o722)
    runs = compilers_run(monkeypatch)
    build.library()
    assert len(runs) == 1
    path.parent.chmod(0o770)
    with pytest.raises(build.BuildError, match="others can write"):
        build.library()
    path.parent.chmod(0o700)
    above = path.parent.parent
    for mode in (0o777, 0o770, 0o2775):
        above.chmod(mode)
        with pytest.raises(build.BuildError, match="others can write"):
            build.library()
    for mode in (0o1777, 0o1775, 0o755):
        above.chmod(mode)
        assert build.library().parent == path.parent, "with the sticky bit only its owner can rename the folder"
    owner = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: owner)
    with pytest.raises(build.BuildError, match="others can write"):
        build.library()


def test_a_folder_below_that_of_somebody_else_is_not_used(tiny, tmp_path, monkeypatch):
    path, real = build.library(), Path.stat
    for uid, safe in ((os.getuid(), True), (0, True), (os.getuid() + 1, False)):

        def owned(path, *args, uid=uid, **kwargs):
            found = real(path, *args, **kwargs)
            if path != tmp_path:
                return found
            return os.stat_result((*found[:4], uid, *found[5:]))

        monkeypatch.setattr(Path, "stat", owned)
        if safe:
            assert build.library() == path
            continue
        with pytest.raises(build.BuildError, match="others can write"):
            build.library()


def test_the_folder_that_was_checked_is_the_one_that_is_used(tiny, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "link"))
    path = build.library()
    assert path.parent == tmp_path / "disk" / "hf_longctx", "who turns the link elsewhere later turns nothing"
    (tmp_path / "disk").chmod(0o777)
    with pytest.raises(build.BuildError, match="others can write"):
        build.library()


def test_a_folder_elsewhere_is_used_through_a_link_of_ones_own_only(tiny, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "disk").mkdir(mode=0o755)
    (tmp_path / "cache" / "hf_longctx").symlink_to(tmp_path / "disk")
    assert build.library().resolve().parent == tmp_path / "disk"
    lstat = Path.lstat
    monkeypatch.setattr(Path, "lstat", lambda path: SimpleNamespace(st_uid=lstat(path).st_uid + 1))
    with pytest.raises(build.BuildError, match="others can write"):
        build.library()


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_no_place_to_write_is_a_reason(tiny, variable, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="cannot be used.*set XDG_CACHE_HOME"):
        build.library()
    assert not (Path.cwd() / "relative").exists()


def test_there_is_no_home(tiny, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(build.BuildError, match="determine home"):
        build.library()


def test_a_full_or_read_only_folder_is_a_reason_but_what_lies_there_is_used(tiny, monkeypatch):
    path = build.library()

    real = os.open

    def refuse(name, *args, **kwargs):
        if str(name).startswith(str(path.parent)):
            raise OSError(30, "Read-only file system")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    assert build.library() == path
    (tiny / "native.cpp").write_text(TINY.replace("42", "43"))
    with pytest.raises(build.BuildError, match="cannot be written.*Read-only"):
        build.library()


def test_a_wrapper_and_arguments_in_cxx(tiny, tmp_path, monkeypatch):
    """As ``CXX="ccache g++ -O1"``; what is not a command is a reason."""
    wrapper = tmp_path / "wrapper"
    wrapper.write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/said"\nexec "$@"\n')
    wrapper.chmod(0o700)
    monkeypatch.setenv("CXX", f"{wrapper} c++ -O1")
    key = build.library().name.split("-")[1]
    said = (tmp_path / "said").read_text().splitlines()
    assert len(said) == 2 and all(line.startswith("c++ -O1 -O3") for line in said)
    assert f"-DHF_LONGCTX_KEY={key}" in said[1]
    monkeypatch.setenv("CXX", "g++ 'never closed")
    with pytest.raises(build.BuildError, match="CXX cannot be read"):
        build.library()


def test_a_compiler_that_hangs_is_given_up_with_all_it_started(tiny, tmp_path, monkeypatch):
    hangs = tmp_path / "hangs"
    hangs.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {tmp_path}/pid\nwait\n")
    hangs.chmod(0o700)
    monkeypatch.setenv("CXX", str(hangs))
    monkeypatch.setattr(build, "PATIENCE", 2)
    with pytest.raises(build.BuildError, match="timed out after 2"):
        build.library()
    child = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    assert not child.exists() or child.read_text().split()[2] in "ZX", "sleep still runs"


def test_windows_declines_with_a_reason(fresh, monkeypatch):
    monkeypatch.setattr(build, "fcntl", None)
    monkeypatch.delattr(os, "getuid")
    assert "Linux and macOS only" in native.supports(dispatch.Case(**CASE))
    assert dispatch.pick("auto", dispatch.Case(**CASE)) is cpu
    code = "sys.modules['fcntl'] = None; del os.getuid; spec.loader.exec_module(build); assert build.fcntl is None"
    subprocess.run([sys.executable, "-c", ALONE + code], check=True)


def test_two_processes_at_once_make_one_library(tiny, tmp_path):
    slow = tmp_path / "slow-compiler"
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *-dM*) ;; *) echo run >> {tmp_path}/runs; sleep 1;; esac\nexec c++ "$@"\n'
    )
    slow.chmod(0o700)
    code = "spec.loader.exec_module(build); build.SOURCES = pathlib.Path(sys.argv[1]); print(build.library())"
    command, environment = [sys.executable, "-c", ALONE + code, str(tiny)], {**os.environ, "CXX": str(slow)}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert {str(path) for path in libraries()} == set(said)
    assert (tmp_path / "runs").read_text().split() == ["run"]


@pytest.mark.parametrize(("compiler", "why"), [("no-such-compiler", "no C\\+\\+ compiler"), ("false", "failed")])
def test_without_a_compiler_one_line_and_the_cpu_kernel(tiny, fresh, compiler, why, monkeypatch, caplog):
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.INFO, logger="hf_longctx"):
        assert dispatch.pick("auto", dispatch.Case(**CASE)) is dispatch.pick("auto", dispatch.Case(**CASE)) is cpu
        assert dispatch.pick("auto", dispatch.Case(**CASE, reads=BlockList)) is cpu
        with pytest.raises(UnsupportedModeError, match=f"native: could not be built.*{why}.*auto or one of: cpu"):
            dispatch.pick("native", dispatch.Case(**CASE))
        q = torch.randn(1, 2, 1, 64)
        assert torch.equal(dense(native, q, q, q, 0.3), dense(cpu, q, q, q, 0.3))
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING


def test_a_source_that_does_not_compile_is_a_reason_not_a_crash(tiny, fresh):
    (tiny / "native.cpp").write_text("nonsense")
    assert "error" in native.supports(dispatch.Case(**CASE))
    assert libraries() == []
    assert [path.name for path in build.cache_folder().iterdir()] == ["lock"]


def test_the_switch(fresh, monkeypatch, caplog):
    monkeypatch.setenv(native.SWITCH, "0")
    monkeypatch.setattr(build, "library", None)  # must not even be looked for
    assert dispatch.pick("auto", dispatch.Case(**CASE)) is cpu
    with pytest.raises(UnsupportedModeError, match="turned off by HF_LONGCTX_NATIVE=0"):
        dispatch.pick("native", dispatch.Case(**CASE))
    assert not caplog.records
    native._load.cache_clear()
    monkeypatch.setenv(native.SWITCH, "off")
    with pytest.raises(ConfigError, match="HF_LONGCTX_NATIVE is 0 .* given 'off'"):
        dispatch.pick("auto", dispatch.Case(**CASE))


def test_importing_compiles_nothing(tmp_path):
    code = "import hf_longctx.kernels.native"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not list(tmp_path.iterdir())
