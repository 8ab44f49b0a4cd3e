"""The training script is seeded and counted in steps: a run that was stopped ends at the same weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "train_tiny" / "train.py"


def train(out: Path, *more: str) -> dict:
    command = [
        sys.executable,
        str(SCRIPT),
        "llama",
        "--out",
        str(out),
        "--scale",
        "0.01",
        "--save-every",
        "20",
        "--questions",
        "0",
    ]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(out / "checkpoint.pt", weights_only=True)


@pytest.mark.slow
def test_a_stopped_run_goes_on(tmp_path):
    whole = train(tmp_path / "whole", "--stop-at", "24")
    half = train(tmp_path / "parts", "--stop-at", "13")
    assert (half["step"], whole["step"]) == (13, 24)
    parts = train(tmp_path / "parts", "--stop-at", "24")
    assert parts["step"] == 24
    for name, weight in whole["model"].items():
        assert torch.equal(parts["model"][name], weight)
    assert any(not torch.equal(half["model"][name], weight) for name, weight in whole["model"].items())
