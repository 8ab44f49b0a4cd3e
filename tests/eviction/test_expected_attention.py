"""``score: expected_attention``: attention of normally distributed queries, turned on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.seen import ROTATION, Prompt

from hf_longctx.eviction import expected_attention
from hf_longctx.eviction.expected_attention import ExpectedAttention
from hf_longctx.layout.scores import Scores

SCALE = 0.7


def same(got, want, atol=1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def moments(prompt, row, head, sink=4):
    """Mean and covariance of the un-rotated queries of one head, by numpy's own definition."""
    q = prompt.q[row, head, sink:]
    q = torch.stack([ROTATION.turn(x[None], torch.tensor([-position]))[0] for position, x in enumerate(q, sink)])
    return q.mean(0), torch.cov(q.T, correction=0)


def turned(future=16):
    """The mean rotation as a matrix for columns, position by position."""
    eye = torch.eye(8, dtype=torch.float64)
    each = [ROTATION.turn(eye, torch.full((8,), 40 + step)).T for step in range(future)]
    return torch.stack(each).mean(0)


def written_out(prompt, covariance=True, sink=4):
    """The rule head by head, as its paper has it: of the tokens after the first ``sink``."""
    made = torch.empty(2, 6, 40 - sink, dtype=torch.float64)
    for row in range(2):
        for head in range(6):
            mean, spread = moments(prompt, row, head, sink)
            mean, spread = turned() @ mean, turned() @ spread @ turned().T
            for token, k in enumerate(prompt.k[row, head // 3, sink:]):
                made[row, head, token] = SCALE * mean @ k + covariance * SCALE**2 * k @ spread @ k / 2
    return prompt.grouped(made.softmax(-1))


def prompt_of() -> Prompt:
    return Prompt.random(scores=Scores(SCALE))


@pytest.mark.quick
@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("sink", [4, 0])
def test_it_is_the_rule_written_out(covariance, sink):
    prompt = prompt_of()
    rule = ExpectedAttention(future=16, sink=sink, covariance=covariance, epsilon=0.01)
    want = (written_out(prompt, covariance, sink) + 0.01) * prompt.v[:, :, sink:].norm(dim=-1)
    found = prompt.score(rule)
    same(found[..., sink:], want)
    same(found[..., :sink], want.amax(-1, keepdim=True).expand(-1, -1, sink))


def test_without_the_values():
    prompt = prompt_of()
    same(prompt.score(ExpectedAttention(future=16, value_norm=False))[..., 4:], written_out(prompt))


def test_random_queries_attend_as_expected():
    """Weights before the softmax, of a hundred thousand normal queries: the mean of their exponentials."""
    prompt = prompt_of()
    seen = prompt.gathered(ExpectedAttention(future=16))
    exponents = ExpectedAttention(future=16)._exponents(seen, torch.float64)
    mean, spread = moments(prompt, 1, 4)
    mean, spread = turned() @ mean, turned() @ spread @ turned().T
    queries = torch.distributions.MultivariateNormal(mean, spread + 1e-9 * torch.eye(8)).sample((100_000,))
    for token in range(40):
        k = prompt.k[1, 1, token]
        sample = (SCALE * queries @ k).exp()
        error = 5 * sample.std() / 100_000**0.5
        assert abs(sample.mean() - exponents[1, 4, token].exp()) < error
        assert abs(sample.mean() - (SCALE * mean @ k).exp()) > error or SCALE**2 * k @ spread @ k / 2 < 0.01


def test_queries_that_are_all_the_same_are_their_mean():
    prompt = prompt_of()
    one = torch.randn(1, 6, 1, 8, dtype=torch.float64).expand(2, 6, 40, 8)
    prompt.q = ROTATION.turn(one, torch.arange(40))
    wide, narrow = (ExpectedAttention(future=16, covariance=covariance) for covariance in (True, False))
    same(prompt.score(wide), prompt.score(narrow))
    at_once = ROTATION.turn(one[:, :, :16], torch.arange(40, 56)).mean(2)
    made = SCALE * (at_once[:, :, None] * prompt.k.repeat_interleave(3, 1)).sum(-1)[..., 4:]
    alone = dataclasses.replace(narrow, value_norm=False)
    same(prompt.score(alone)[..., 4:], prompt.grouped(made.softmax(-1)))


def test_large_means_do_not_drown_small_deviations():
    """Sums of squares in float32 would: the deviations are a hundred thousandth of the mean's square."""
    prompt = prompt_of()
    prompt.q = ROTATION.turn(300 + torch.randn(2, 6, 40, 8, dtype=torch.float64), torch.arange(40)).float()
    rule = ExpectedAttention(future=16)
    for cuts in ((), (11, 30)):
        state = prompt.gathered(rule, cuts).state
        found = state["spread"][1, 2] / state["count"][1, 2]
        want = moments(Prompt(prompt.q.double(), prompt.k, prompt.v), 1, 2)[1]
        same(found.double(), want, 2e-3)


def test_pieces_of_long_prompts(monkeypatch):
    prompt, rule = prompt_of(), ExpectedAttention(future=16)
    want = prompt.score(rule)
    monkeypatch.setattr(expected_attention, "PIECE", 7)
    same(prompt.score(rule), want)


def test_a_prompt_of_sinks_alone():
    prompt = Prompt.random(4)
    same(prompt.score(ExpectedAttention(value_norm=False)), torch.full((2, 2, 4), 0.25, dtype=torch.float64))
