"""``score: tova``: the weights of the last query, alike in all heads."""

from __future__ import annotations

import pytest
import torch
from helpers.seen import Prompt

from hf_longctx.eviction.tova import Tova


@pytest.mark.quick
def test_it_is_the_mean_of_the_last_weights():
    prompt = Prompt.random()
    found = prompt.score(Tova())
    want = prompt.weights()[:, :, -1].mean(1)
    for head in range(2):
        torch.testing.assert_close(found[:, head], want, rtol=0, atol=1e-12)
    assert found.sum(-1).flatten().tolist() == pytest.approx([1.0] * 4)
    assert Tova.alike and Tova().queries == 1
