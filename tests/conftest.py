"""Fixtures of all tests."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from helpers.registered import nothing_kept
from helpers.spanning import left_to_the_slow
from helpers.tiny import Shadow

import hf_longctx.model.attention
from hf_longctx.kernels import _native_speed


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in left_to_the_slow(items):
        item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """Modules, and the tests themselves, are not searched for garbage again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _words():
    with nothing_kept():
        yield


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_speeds(monkeypatch):
    """``auto`` takes native wherever it runs: what was measured on this kind of machine decides nothing."""
    monkeypatch.setattr(_native_speed, "table", dict)


@pytest.fixture(autouse=True)
def _nan_memory(monkeypatch):
    """Uninitialised memory is NaN, so that a kernel that reads a slot nobody wrote cannot go unseen."""
    new_empty = torch.Tensor.new_empty

    def nan_filled(self, *size, **kwargs):
        out = new_empty(self, *size, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", nan_filled)


@pytest.fixture
def shadow(monkeypatch):
    made = []

    def make(config, **kwargs):
        made.append(Shadow(monkeypatch, config, **kwargs))
        return made[-1]

    yield make
    monkeypatch.undo()
    if made:
        hf_longctx.model.attention.register()
