"""The cases of the Triton kernels on a GPU, in the two dtypes that it serves: python -m pytest tests/gpu."""

from __future__ import annotations

import pytest
import torch
from helpers.triton_cases import LOW, cases

CASES = {dtype: cases((dtype,)) for dtype in LOW}


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", [name.replace(str(LOW[0]), "") for name in CASES[LOW[0]]])
def test_case(name, dtype):
    (run,) = [run for full, run in CASES[dtype].items() if full.replace(str(dtype), "") == name]
    run(torch.device("cuda"))


def test_how_many_cases_there_are():
    assert {dtype: len(found) for dtype, found in CASES.items()} == dict.fromkeys(LOW, 34)
