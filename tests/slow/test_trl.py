"""The real TRL on a patched policy, in an environment of its own above this one: its trainers load a reference model.

It never skips: where the environment cannot be made, the test fails and shows why.
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


def run(*command: str) -> str:
    """Standard output of a command that must succeed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of a fresh environment that sees what this one has installed, and TRL."""
    folder = tmp_path_factory.mktemp("trl") / "venv"
    run(sys.executable, "-m", "venv", str(folder))
    own = next(folder.glob("lib/python*/site-packages"))
    below = [path for path in sys.path if path.endswith("site-packages")]
    (own / "below.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in below))
    found = str(folder / "bin" / "python")
    run(found, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "trl")
    return found


@pytest.mark.parametrize("trainer", ["dpo", "grpo"])
def test_a_step_with_a_reference_model(python, trainer):
    said = json.loads(run(python, str(TESTS / "helpers" / "trl_steps.py"), trainer).splitlines()[-1])
    assert said == {"steps": 1, "reference": True, "word": "longctx", "policy": True}
