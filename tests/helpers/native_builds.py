"""The native kernels as other CPUs compile them."""

from __future__ import annotations

import platform
import shutil

import pytest
import torch

from hf_longctx.errors import ConfigError
from hf_longctx.kernels import _native_build as build
from hf_longctx.kernels import base as dispatch
from hf_longctx.kernels import native

# What other CPUs would compile; a compiler for x86 can leave instructions out, one for another CPU has one code path.
BUILDS = ["avx512", "avx2", "-mno-avx512bf16", "-mno-avx"] if platform.machine() in ("x86_64", "AMD64") else []


@pytest.fixture(params=BUILDS)
def other_build(request, monkeypatch):
    if request.param in build.LEVELS:
        monkeypatch.setenv(build.ARCH, request.param)
    else:
        monkeypatch.setenv("CXX", f"{shutil.which('g++') or 'c++'} {request.param}")
    native._load.cache_clear()
    try:
        native._load()
    except ConfigError as error:
        pytest.skip(str(error))
    if request.param == "-mno-avx":
        assert "AVX2" in native.supports(dispatch.Case(torch.device("cpu"), torch.float32, 64)), (
            "it would be slower than torch"
        )
        monkeypatch.setattr(native, "WIDTH", 4)
        native._load.cache_clear()
    assert native.supports(dispatch.Case(torch.device("cpu"), torch.float32, 64)) is None
    yield
    native._load.cache_clear()
