"""What indexes and `make` are told: the description shows outside a checkout, and the demo installs what it needs."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from hf_longctx.model.checkpoint import REQUIREMENT

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
README = (ROOT / "README.md").read_text("utf-8")
# runpy gives the module another name than __main__, so that nothing is set up.
long_description = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["long_description"]


def fences(text: str) -> list[str]:
    return re.findall(r"^```.*?^```$", text, re.M | re.S)


def test_the_description_has_no_picture_and_no_link_into_the_checkout():
    text = long_description(README)
    assert "](docs/" in README and "![" in README, "there is something to leave out"
    assert "![" not in text and not re.findall(r"\]\((?!https?:)", text)
    assert fences(text) == fences(README) and len(fences(text)) >= 4
    assert text.startswith("# hf_longctx\n") and "Troubleshooting" in text


def test_what_the_description_keeps():
    given = (
        "![a](b.png)\n\nSee [the docs](docs/a.md) and [the paper](https://example.org/x).\n\n```python\nx[0](1)\n```\n"
    )
    want = "See the docs and [the paper](https://example.org/x).\n\n```python\nx[0](1)\n```\n"
    assert long_description(given).startswith(want)


def test_the_metadata_names_authors_systems_and_versions_and_no_made_up_address():
    assert PROJECT["authors"] == [{"name": "hf_longctx contributors"}]
    assert "urls" not in PROJECT
    kinds = PROJECT["classifiers"]
    assert "Operating System :: POSIX :: Linux" in kinds
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {oldest}" in kinds
    assert not [one for one in kinds if one.startswith("License")], "PEP 639: not beside a license expression"


def test_vllm_finds_its_plugin():
    module, _, name = PROJECT["entry-points"]["vllm.general_plugins"]["hf_longctx"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def make(*arguments: str, folder: Path) -> str:
    """The commands that make would run in an environment that is not there yet."""
    # A make that runs the tests hands its options on, and says then which folder it enters and leaves.
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "-n", f"VENV={folder / 'venv'}", "PYTHON=python9", "TORCH=torch==9 --some-option", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=outside, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("target", "dev", "real", "last"),
    [
        ("demo", False, False, "hf-longctx demo"),
        ("real", False, True, "hf-longctx demo --real"),
        ("install", True, True, ".installed-real"),
        ("test", True, False, "-n 2 -q"),
        ("test-slow", True, True, "-m slow"),
        ("lint", True, False, "ruff check ."),
        ("notebooks", True, True, "run_notebooks.py"),
    ],
)
def test_a_target_installs_what_it_needs(target, dev, real, last, tmp_path):
    said = make(target, folder=tmp_path)
    assert ("[dev]" in said) == dev
    assert ("[real]" in said) == (f"--no-deps {REQUIREMENT}\n" in said) == (REQUIREMENT in said) == real
    assert said.count("pip install --quiet torch==9 --some-option") == 1 and f"python9 -m venv {tmp_path}" in said
    assert said.rstrip().endswith(last)


def test_nothing_is_installed_twice(tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / ".installed").touch()
    assert "pip" not in make("demo", folder=tmp_path)
    assert make("test", folder=tmp_path).count("pip install") == 1, "the rest, beside the package"
    (tmp_path / "venv" / ".installed-dev").touch()
    assert "pip" not in make("test", folder=tmp_path)
    (tmp_path / "venv" / ".installed-real").touch()
    assert "pip" not in make("real", folder=tmp_path) + make("test-slow", folder=tmp_path)
