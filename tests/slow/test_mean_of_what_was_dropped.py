"""What docs/results/2026-11-21-compensated.md found: the mean of dropped tokens helps heads that need no single one."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[2] / "examples" / "train_tiny"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("compare_stores")
    sys.path.remove(str(SCRIPTS))


def kl(found: dict, heads: str, store: str) -> list[float]:
    return [row["kl"] for row in found[heads][store].values()]


def test_the_mean_helps_the_shipped_heads_at_every_window(script):
    for name in ("tiny-llama", "tiny-mistral", "tiny-qwen3"):
        found = script.compare(name, 2048, 4, 16)
        plain, mean = (kl(found, "shipped", store) for store in script.STORES)
        better = [b < a for a, b in zip(plain, mean, strict=True)]
        assert better == [True] * 4, (name, plain, mean)
        plain, mean = (kl(found, "all stream", store) for store in script.STORES)
        worse = [b > a for a, b in zip(plain, mean, strict=True)]
        assert worse == [name == "tiny-qwen3"] * 4, (name, plain, mean)
