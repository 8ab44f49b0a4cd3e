"""``score: keyformer``: sums of noisy weights, with noise that depends on places alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers.seen import Prompt

from hf_longctx.eviction.keyformer import Keyformer, gumbel, mix
from hf_longctx.eviction.observed import Observed
from hf_longctx.layout.scores import Scores


def same(got, want, atol=1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@pytest.mark.quick
def test_without_noise_it_is_observed():
    prompt = Prompt.random()
    same(prompt.score(Keyformer(noise=0.0)), prompt.score(Observed()))
    assert (prompt.score(Keyformer()) - prompt.score(Observed())).abs().max() > 0.1


def test_it_is_the_sum_of_noisy_weights():
    prompt, rule = Prompt.random(), Keyformer(tau=1.7, noise=0.8, seed=5)
    noise = gumbel(5, prompt.seen(0, 40, rule, {}), 0, 40).double()
    want = prompt.grouped(prompt.weights(lambda made: (made + 0.8 * noise) / 1.7).sum(2))
    same(prompt.score(rule), want)
    assert (prompt.score(dataclasses.replace(rule, seed=6)) - want).abs().max() > 0.1


def test_a_sink_without_a_value_has_the_temperature_too():
    prompt, sinks = Prompt.random(), torch.randn(6, dtype=torch.float64)
    prompt.scores = Scores(0.5, sinks=sinks)
    noise = torch.zeros(40, 41, dtype=torch.float64)
    k = torch.cat([prompt.k.repeat_interleave(3, 1), torch.zeros(2, 6, 1, 8)], 2)
    made = prompt.q @ k.transpose(2, 3) * 0.5 + noise
    made[..., 40] = sinks[:, None]
    later = torch.ones(40, 41, dtype=torch.bool).triu(1)
    later[:, 40] = False
    weights = (made / 2.0).masked_fill(later, float("-inf")).softmax(-1)[..., :40]
    same(prompt.score(Keyformer(tau=2.0, noise=0.0)), prompt.grouped(weights.sum(2)))


def test_noise_depends_on_places_alone():
    prompt, rule = Prompt.random(), Keyformer()
    whole = gumbel(0, prompt.seen(0, 40, rule, {}), 0, 40)
    piece = gumbel(0, prompt.alone(1).seen(20, 40, rule, {}), 3, 9)
    assert torch.equal(piece, whole[:, 23:29])
    gaps = gumbel(0, prompt.seen(30, 40, rule, {}, [0, 5, 6]), 0, 10)
    assert torch.equal(gaps[..., :3], whole[:, 30:, [0, 5, 6]]) and torch.equal(gaps[..., 3:], whole[:, 30:, 30:])
    elsewhere = Prompt(prompt.q, prompt.k, prompt.v, layer=2).seen(0, 40, rule, {})
    assert not torch.isclose(gumbel(0, elsewhere, 0, 40), whole, atol=1e-3).float().mean() > 0.01


def test_noise_is_of_a_gumbel():
    k = torch.zeros(1, 4, 300, 8)
    noise = gumbel(7, Prompt(k, k, k).seen(0, 300, Keyformer(), {}), 0, 300)
    assert noise.isfinite().all() and len(noise.unique()) > 0.95 * noise.numel()
    count = noise.numel()
    assert noise.mean() == pytest.approx(0.57722, abs=5 * 1.2825 / math.sqrt(count))
    assert noise.var() == pytest.approx(math.pi**2 / 6, rel=0.01)
    flat = noise - noise.mean()
    for other in (flat.roll(1, -1), flat.roll(1, -2), flat.roll(1, 0)):  # neighbours say nothing about each other
        assert abs((flat * other).mean() / flat.var()) < 5 / math.sqrt(count)


def test_numbers_are_mixed_one_to_one():
    numbers = torch.arange(1 << 16)
    assert len(mix(numbers).unique()) == 1 << 16
    assert mix(numbers)[77] == mix(77) and 0 <= mix((1 << 32) - 1) < 1 << 32
