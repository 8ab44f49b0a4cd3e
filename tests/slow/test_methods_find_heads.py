"""On every embedded model every identification method beats random orders, and the best one comes close to ablation."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_longctx.assets import assets

pytestmark = pytest.mark.slow

# The heads of tiny-qwen3 attend to no copies (docs/heads.md), which methods that look for copies notice.
DOUBTS = {"tiny-qwen3": {"echo_induction", "retrieval_score", "mean_rank"}}
SCRIPTS = Path(__file__).parents[2] / "examples" / "train_tiny"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("compare_methods")
    sys.path.remove(str(SCRIPTS))


def test_there_are_three_models():
    assert assets() == ["tiny-llama", "tiny-mistral", "tiny-qwen3"]


@pytest.mark.parametrize("name", assets())
def test_methods_find_the_heads_that_ablation_finds(name, script):
    found, saved = {}, []
    script.compare(name, 2048, 4, 16, found, lambda: saved.append(len(found)))
    random = [found[f"random {seed}"]["area"] for seed in range(script.RANDOM_ORDERS)]
    areas = {method: found[method]["area"] for method in script.OPTIONS}
    assert found["dense"] > 0.85 and len(saved) == 1 + len(areas) + len(random)
    assert np.mean(random) < found["ablation"]["area"] - 0.1, "a control: the order matters"
    sure = {method: area for method, area in areas.items() if found[method]["confidence"] == "measured"}
    assert set(areas) - set(sure) == DOUBTS.get(name, set())
    assert min(sure.values()) > np.mean(random), areas
    assert max(areas.values()) >= 0.95 * found["ablation"]["area"], areas
    measured = len(saved)
    script.compare(name, 2048, 4, 16, found, lambda: saved.append(len(found)))
    assert len(saved) == measured, "what is there is not measured again"
