"""``score: observed``: column sums of the attention weights."""

from __future__ import annotations

import pytest
import torch
from helpers.seen import Prompt

from hf_longctx.eviction import _columns
from hf_longctx.eviction.observed import Observed
from hf_longctx.eviction.snapkv import Snapkv


def same(got, want) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.quick
def test_it_is_the_sum_over_all_queries():
    prompt = Prompt.random()
    sums = prompt.grouped(prompt.weights().sum(2))
    same(prompt.score(Observed()), sums)
    same(prompt.score(Observed(mean=True)), sums / torch.arange(40, 0, -1))
    assert sums.sum(-1) == pytest.approx(40)


def test_few_weights_at_once(monkeypatch):
    prompt = Prompt.random()
    monkeypatch.setattr(_columns, "IN_CACHES", 2500)  # five queries
    same(prompt.score(Observed()), prompt.grouped(prompt.weights().sum(2)))
    seen = prompt.seen(0, 40, Observed(), {})
    pieces = [made.shape[2:] for _, made in _columns.weights_in_pieces(seen)]
    assert pieces == [(5, width) for width in range(5, 41, 5)]


def test_a_window_of_the_whole_prompt_without_neighbours_is_its_mean():
    """The limit case of SnapKV; its own window's keys it scores as nothing."""
    prompt = Prompt.random()
    last = prompt.grouped(prompt.weights()[:, :, 20:].mean(2))
    same(prompt.score(Snapkv(window=20, pool=1))[..., :20], last[..., :20])
    first_seen = prompt.seen(20, 40, Observed(), {})
    Observed().gather(first_seen)
    same(Observed().score(first_seen) / 20, last)


def test_a_mean_counts_the_queries_that_were_gathered():
    """After an eviction, and with tokens in between whose queries were not shown, as decoded ones are not."""
    prompt, rule, kept = Prompt.random(60), Observed(mean=True), [0, 7, 29]
    state = Prompt(*(x[:, :, :30] for x in (prompt.q, prompt.k, prompt.v))).gathered(rule).state
    state = {name: x[:, :, kept] for name, x in state.items()}
    seen = prompt.seen(50, 60, rule, state, [*kept, *range(40, 50)])
    rule.gather(seen)
    counts = [30 + 10, 23 + 10, 1 + 10, *[10] * 10, *range(10, 0, -1)]
    assert seen.state["readers"][1, 1].tolist() == counts
    alone = {}
    plain = Observed()
    plain.gather(prompt.seen(50, 60, plain, alone, [*kept, *range(40, 50)]))
    same(rule.score(seen)[..., 3:], alone["sums"][..., 3:] / torch.tensor(counts[3:]))
