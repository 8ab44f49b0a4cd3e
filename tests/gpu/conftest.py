"""What needs a GPU is skipped, and said so, where there is none; everything else that is missing fails."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")
