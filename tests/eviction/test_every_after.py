"""What holds for everything that may become of evicted tokens."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import cases

from hf_longctx.config.words import load, words

CASES = cases("eviction.after")


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("biased", [False, True])
def test_as_many_are_left_as_were_kept(case, dtype, biased):
    word, fields = CASES[case]
    after = load("eviction.after", word)(**fields)
    k, v = (torch.randn(20, 8, dtype=torch.float64).to(dtype) for _ in "kv")
    bias, keep = torch.rand(20) if biased else None, torch.rand(20) < 0.4
    given = [x.clone() for x in (k, v, keep)]
    left = after.apply(k, v, bias, keep)
    assert all(torch.equal(x, before) for x, before in zip((k, v, keep), given, strict=True))
    assert left.k.shape == left.v.shape == (int(keep.sum()), 8) and left.k.dtype == left.v.dtype == dtype
    assert left.k.isfinite().all() and left.v.isfinite().all()
    if biased or after.biased:
        assert left.bias.shape == (int(keep.sum()),) and left.bias.dtype == torch.float32
        assert (left.bias >= (bias[keep] if biased else 0)).all()
    else:
        assert left.bias is None


@pytest.mark.parametrize("case", CASES)
def test_where_everything_is_kept_nothing_changes(case):
    word, fields = CASES[case]
    k, v = torch.randn(20, 8), torch.randn(20, 8)
    left = load("eviction.after", word)(**fields).apply(k, v, None, torch.ones(20, dtype=torch.bool))
    assert torch.equal(left.k, k) and torch.equal(left.v, v) and (left.bias is None or not left.bias.any())


def test_every_word_is_here():
    assert {word for word, _ in CASES.values()} == set(words("eviction.after")) and len(CASES) > 2
