"""``after: merge``: copies merge without loss, and nothing that is unlike."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.config_cases import refused

from hf_longctx.config.words import build
from hf_longctx.eviction.after import merge
from hf_longctx.eviction.after.drop import Drop
from hf_longctx.eviction.after.merge import Merge


def same(got, want, atol=1e-6) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def attended(q, k, v, bias=None):
    made = q @ k.T * 0.4
    return (made if bias is None else made + bias).softmax(-1) @ v


def tokens(count=20, dtype=torch.float64):
    return (torch.randn(count, 8, dtype=torch.float64).to(dtype) for _ in "kv")


def every(count, step=2):
    keep = torch.zeros(count, dtype=torch.bool)
    keep[::step] = True
    return keep


@pytest.mark.quick
@pytest.mark.parametrize("biases", [None, "earlier counts"])
def test_copies_merge_without_loss(biases):
    k, v = (x.repeat_interleave(3, 0) for x in tokens(10))
    v = v + torch.randn(30, 8, dtype=torch.float64)  # of equal keys the values may differ
    bias = None if biases is None else torch.randint(1, 5, (30,)).float().log()
    q = torch.randn(7, 8, dtype=torch.float64)
    left = Merge(similarity=0.99).apply(k, v, bias, every(30, 3))
    assert left.k.shape == (10, 8) and left.bias.dtype == torch.float32
    want = attended(q, k, v, bias)
    same(attended(q, left.k, left.v, left.bias), want)
    assert (attended(q, left.k, left.v) - want).abs().max() > 1e-2 or biases is None  # alike counts cancel
    dropped = Drop().apply(k, v, bias, every(30, 3))
    assert (attended(q, dropped.k, dropped.v, dropped.bias) - want).abs().max() > 1e-2


def test_different_counts_need_the_bias():
    k, v = tokens(4)
    k = k[[0, 0, 0, 1, 2, 3]]
    v = v[[0, 0, 0, 1, 2, 3]]
    left = Merge().apply(k, v, None, torch.tensor([True, False, False, True, True, True]))
    same(left.bias, torch.tensor([math.log(3), 0.0, 0.0, 0.0]))
    q = torch.randn(7, 8, dtype=torch.float64)
    same(attended(q, left.k, left.v, left.bias), attended(q, k, v))
    assert (attended(q, left.k, left.v) - attended(q, k, v)).abs().max() > 1e-2


@pytest.mark.parametrize("bias", [None, torch.randint(1, 5, (20,)).float().log()])
def test_at_a_similarity_of_one_evicted_tokens_are_dropped(bias):
    k, v = tokens()
    k[1] = k[0]
    left, dropped = (after.apply(k, v, bias, every(20)) for after in (Merge(similarity=1.0), Drop()))
    assert torch.equal(left.k, dropped.k) and torch.equal(left.v, dropped.v)
    assert torch.equal(left.bias, torch.zeros(10) if bias is None else dropped.bias)


def test_it_is_the_rule_written_out():
    k, v = tokens(30)
    keep, bias = every(30, 3), torch.randint(1, 4, (30,)).float().log()
    left = Merge(similarity=0.5).apply(k, v, bias, keep)
    kept = keep.nonzero().flatten().tolist()
    groups = {one: [one] for one in kept}
    for one in (~keep).nonzero().flatten().tolist():
        alike = {other: torch.cosine_similarity(k[one], k[other], dim=0).item() for other in kept}
        best = max(alike, key=alike.get)
        if alike[best] > 0.5:
            groups[best].append(one)
    sizes = [len(group) for group in groups.values()]
    assert max(sizes) > 2 and min(sizes) == 1 and sum(sizes) < 30
    for slot, group in enumerate(groups.values()):
        counts = bias[group].double().exp()
        for got, x in ((left.k, k), (left.v, v)):
            same(got[slot], (counts[:, None] * x[group]).sum(0) / counts.sum())
        same(left.bias[slot].double(), counts.sum().log())


def test_few_similarities_at_once(monkeypatch):
    k, v = tokens(30)
    whole = Merge(similarity=0.3).apply(k, v, None, every(30, 3))
    monkeypatch.setattr(merge, "TEMPORARY", 25)
    left = Merge(similarity=0.3).apply(k, v, None, every(30, 3))
    assert torch.equal(left.k, whole.k) and torch.equal(left.bias, whole.bias)


def test_halves_are_merged_in_float32_and_what_is_alone_stays_as_it_is():
    k, v = tokens(3, torch.bfloat16)
    k, v = k[[0, 0, 1, 2]], v[[0, 0, 1, 2]]
    before = k.clone(), v.clone()
    left = Merge().apply(k, v, None, torch.tensor([True, False, True, True]))
    assert left.k.dtype == left.v.dtype == torch.bfloat16
    assert torch.equal(left.k, k[1:]) and torch.equal(left.v, v[1:])
    assert torch.equal(k, before[0]) and torch.equal(v, before[1])


@pytest.mark.parametrize("keep", [torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)])
def test_nothing_or_everything_is_kept(keep):
    k, v = tokens(6)
    left = Merge(similarity=-1.0).apply(k, v, None, keep)
    assert (
        torch.equal(left.k, k[keep]) and torch.equal(left.v, v[keep]) and torch.equal(left.bias, torch.zeros(6)[keep])
    )


def test_a_config_names_it():
    given = {"after": "merge", "similarity": 0.6}
    assert build("eviction.after", given, "after", "after", "retrieval") == Merge(0.6)
    given["similarity"] = 2.0
    refused(lambda: build("eviction.after", given, "after", "after", "retrieval"), "after.similarity", "at most 1.0")
