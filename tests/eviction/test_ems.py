"""``score: ems``: the greater of a global and a local share."""

from __future__ import annotations

import pytest
import torch
from helpers.seen import Prompt

from hf_longctx.eviction.ems import Ems
from hf_longctx.eviction.observed import Observed


def shares(made):
    return made / made.sum(-1, keepdim=True)


@pytest.mark.quick
def test_it_is_the_greater_of_both_shares():
    prompt = Prompt.random()
    weights = prompt.weights()
    whole = shares(prompt.grouped(weights.sum(2) / torch.arange(40, 0, -1)))
    near = prompt.grouped(weights[:, :, 32:].sum(2) / torch.arange(40, 0, -1).clamp(max=8))
    want = torch.maximum(whole, shares(near))
    found = prompt.score(Ems(window=8))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    assert (found > whole + 1e-6).any() and (found > shares(near) + 1e-6).any()


def test_a_window_of_everything_is_the_global_score():
    prompt = Prompt.random()
    want = shares(prompt.score(Observed(mean=True)))
    torch.testing.assert_close(prompt.score(Ems(window=64)), want, rtol=0, atol=1e-12)
