"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest

from hf_longctx.kernels import native


@pytest.fixture
def native_on(monkeypatch):
    """The native kernel, whatever the environment says of it; what a test switched off is looked at anew afterwards."""
    monkeypatch.delenv(native.SWITCH, raising=False)
    native._load.cache_clear()
    yield
    native._load.cache_clear()
