"""Weights of bitsandbytes, which runs on CPUs, under a patched model. It is put into a folder of its own: 43 MB.

It never skips: where it cannot be installed, the test fails and shows why.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
PACKAGE = "bitsandbytes==0.50.2"


def run(folder: Path, *arguments: str) -> str:
    """Standard output of this Python, which must succeed, with what is installed in a folder."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), str(folder)])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("bitsandbytes")
    run(folder, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PACKAGE)
    return json.loads(run(folder, "-W", "ignore", "-m", "helpers.bitsandbytes_answers").splitlines()[-1])


@pytest.mark.parametrize(("kind", "linear"), [("8 bits", "Linear8bitLt"), ("nf4", "Linear4bit"), ("fp4", "Linear4bit")])
def test_a_patched_model_answers_as_the_quantised_one(found, kind, linear):
    got = found[kind]
    assert got["linear"] == linear and got["quantised"] > 0.5, "the weights are quantised"
    assert got["retrieval"] == 0 and got["tokens"] and got["patched"]
    assert got["streaming"] == 0 and got["control"] > 0.5, "the dense mask, and not all tokens"
