"""Other versions of Transformers, each in an environment of its own: the seam's contract, and the tests of every mode.

The oldest that is supported, and the last in which the cache had its old name.

It never skips: where the environment cannot be made, the test fails and shows why.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_longctx.model import contract

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
OLDEST = "5.0.0"
VERSIONS = (OLDEST, "5.23.0")
NEEDS = ["accelerate", "jinja2", "numpy", "pytest", "pyyaml", "rich", "safetensors", "typer"]
TESTS = [
    "tests/contract/test_transformers_facts.py",  # serving needs 5.24
    "tests/cache/test_seam.py",
    "tests/model/test_silently_wrong.py",
    "tests/model/test_attention.py",
    "tests/cache/test_cache.py",
    "tests/cache/test_dense_members.py",
    "tests/cache/test_forks.py",
    "tests/model/test_generate.py",
    "tests/model/test_loading.py",
    "tests/layout/test_mask_errors.py",
    "tests/prompts/test_prompt_cache.py",
    "tests/model/test_prompt_options.py",
    "tests/model/test_refusals.py",
    "tests/model/test_second_model.py",
    "tests/config/test_published_configs.py",
    "tests/identification/test_methods.py",
    "tests/prefill/test_patched_prefill.py",
    "tests/evaluate/test_measures.py",
    "tests/tasks/test_answer.py",
]
FEWEST = 1000  # tests; a run that finds almost none must not pass


def run(*command: str) -> str:
    """Standard output of a command that must succeed, run as if nothing of this environment were there."""
    ours = ("PYTEST_", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
    return done.stdout


@pytest.fixture(scope="module", params=VERSIONS)
def other(request, tmp_path_factory):
    """(version, Python) of a fresh environment with that Transformers and the PyTorch that is running now."""
    folder = tmp_path_factory.mktemp("other") / "venv"
    run(sys.executable, "-m", "venv", str(folder))
    found = str(folder / "bin" / "python")
    pip = (found, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    version = torch.__version__.partition("+")[0]
    run(*pip, f"torch=={version}", f"transformers=={request.param}", *NEEDS)
    run(*pip, "--no-deps", "-e", str(ROOT))
    yield request.param, found
    shutil.rmtree(folder, ignore_errors=True)


def test_the_range_begins_with_the_oldest_and_has_no_end():
    assert f'"transformers>={OLDEST.removesuffix(".0")},!=5.2.*",' in (ROOT / "pyproject.toml").read_text()
    assert OLDEST.removesuffix(".0") == contract.OLDEST


def test_another_transformers(other):
    version, python = other
    assert run(python, "-c", "import transformers; print(transformers.__version__)").strip() == version
    said = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS)
    passed = re.search(r"(\d+) passed", said)
    assert passed, said[-2000:]
    assert int(passed.group(1)) >= FEWEST, said[-2000:]
    assert "skipped" not in said.splitlines()[-1], said[-4000:]
