"""``score: key_diff``: minus the cosine to the mean key."""

from __future__ import annotations

import pytest
import torch
from helpers.seen import Prompt
from torch.nn.functional import cosine_similarity

from hf_longctx.eviction.key_diff import KeyDiff


@pytest.mark.quick
def test_it_is_the_cosine_to_the_mean_of_unit_keys():
    prompt = Prompt.random()
    found = prompt.score(KeyDiff())
    for row in range(2):
        for head in range(2):
            k = prompt.k[row, head]
            middle = torch.stack([x / x.norm() for x in k]).mean(0)
            want = torch.stack([-cosine_similarity(x, middle, dim=0) for x in k])
            torch.testing.assert_close(found[row, head], want, rtol=0, atol=1e-12)


def test_lengths_of_keys_say_nothing_and_the_odd_one_stays():
    k = torch.ones(1, 1, 6, 8, dtype=torch.float64) * torch.arange(1.0, 7.0)[:, None]
    k[..., 3, :4] *= -1
    prompt = Prompt(k, k, k)
    found = prompt.score(KeyDiff())[0, 0]
    assert found.argmax() == 3 and found[[0, 1, 2, 4, 5]].tolist() == pytest.approx([found[0].item()] * 5)
