"""``select: soft_vote``: one set of tokens for all heads of a layer, chosen by the sum of their softmax weights."""

from __future__ import annotations

import pytest
import torch
from helpers.config_cases import refused
from helpers.decode_layer import (
    OUTSIDE,
    SCALE,
    SMALL,
    assert_rows_as_alone,
    assert_same,
    choose,
    decoded,
    dense,
    outside,
    over,
    tokens,
    top,
)

from hf_longctx.decode.soft_vote import SoftVote
from hf_longctx.layout import gather

EVERY = {"similar": None, "refresh": 1}  # chooses for each token


def votes(spec: SoftVote, qkv, position: int) -> list[float]:
    """Of the tokens that the query at ``position`` may choose, in order."""
    q, k, _ = qkv
    high = position + 1 - spec.recent
    group = q.shape[1] // k.shape[1]
    total = torch.zeros(high - spec.sink, dtype=torch.float64)
    for head in range(q.shape[1]):
        total += (k[0, head // group, spec.sink : high] @ q[0, head, position] * SCALE).softmax(0)
    each = total.tolist()
    half = spec.pool // 2
    return [max(each[max(0, at - half) : at + half + 1]) for at in range(len(each))]


def loop(spec: SoftVote, qkv, prompt: int) -> list[list[set[int]]]:
    """The positions that each token after the prompt reads, by KV head."""
    q, k, _ = qkv
    last, chosen = None, set()
    read = []
    for position in range(prompt, q.shape[2]):
        high = position + 1 - spec.recent
        if high - spec.sink <= spec.budget:
            read.append([set(range(position + 1))] * k.shape[1])
            continue
        again = last is not None and last // spec.refresh == position // spec.refresh
        if again and spec.similar is not None:
            now, before = (q[0, :, at].flatten() for at in (position, last))
            again = bool(now @ before / (now.norm() * before.norm()) >= spec.similar)
        if not again:
            last, edge, chosen = position, high, top(votes(spec, qkv, position), spec.budget, spec.sink)
        read.append([chosen | outside(spec, position, edge)] * k.shape[1])
    return read


@pytest.mark.parametrize("more", [1, 5, 63])  # tokens between sinks and newest ones
@pytest.mark.parametrize(
    "fields", [EVERY, {"similar": 0.1, "refresh": 16}, {"similar": None, "refresh": 8}, {**EVERY, "pool": 5}]
)
def test_reads_what_the_steps_of_the_method_say(more, fields):
    spec = SoftVote(**{**SMALL, "budget": 5, **fields})
    prompt = OUTSIDE + more
    qkv = tokens(prompt + 40)
    out, counts = decoded(spec, qkv, prompt)
    read = loop(spec, qkv, prompt)
    assert_same(out, over(qkv, prompt, read))
    ran = read[max(0, 5 - more) :]
    assert counts.chosen + counts.reused == len(ran)
    assert sum(int(part) for part in counts.reads.values()) == sum(len(one) for by_head in ran for one in by_head)


@pytest.mark.parametrize("wrong", [{"pool": 3}, {"budget": 6}, {"similar": 0.9}])
def test_the_loop_can_differ(wrong):
    fields = {**SMALL, "budget": 5, "similar": 0.1, "refresh": 16}
    qkv = tokens(80)
    out, _ = decoded(SoftVote(**fields), qkv, 40)
    assert (out - over(qkv, 40, loop(SoftVote(**{**fields, **wrong}), qkv, 40))).abs().max() > 1e-3


@pytest.mark.parametrize("fields", [{"budget": 100}, {"share": 1.0}])
def test_its_limits_are_dense(fields):
    qkv = tokens(90)
    assert_same(decoded(SoftVote(**SMALL, **fields), qkv, 40)[0], dense(qkv, 40))


def test_how_alike_queries_must_be():
    qkv = tokens(104)
    _, never = decoded(SoftVote(**SMALL, budget=5, similar=1.0, refresh=64), qkv, 40)
    assert (never.chosen, never.reused) == (64, 0)
    _, always = decoded(SoftVote(**SMALL, budget=5, similar=-1.0, refresh=16), qkv, 40)
    assert (always.chosen, always.reused) == (5, 59)  # at 40, 48, 64, 80 and 96


def test_all_heads_read_one_set_and_a_shared_favourite_wins():
    q, k, _ = tokens(60, heads=8)
    q[:, :, -1] = 0
    q[0, :, -1, 0] = torch.tensor([9.0, 9, 9, 9, 8, 8, 8, 8])
    k[..., 0] = 0
    k[0, 0, 20, 0] = 2  # 4 heads' favourite, less of it
    k[0, 1, 20, 0] = 1
    k[0, 1, 30, 0] = 1.2  # of the other 4
    entries = choose(SoftVote(**SMALL, budget=1), q[:, :, -1:], k).entries
    assert entries.tolist() == [[[20], [20]]]


def test_equal_votes_go_to_the_first_tokens():
    q, k, _ = tokens(50)
    none = choose(SoftVote(**SMALL, budget=3), q[:, :, -1:] * 0, k)
    assert none.entries.tolist() == [[[4, 5, 6]] * 2]
    k[:] = 0
    k[:, :, 20] = q[:, :2, -1]
    around = choose(SoftVote(**SMALL, budget=3, pool=5), k[:, :, 20:21].repeat_interleave(2, 1), k)
    assert around.entries.tolist() == [[[18, 19, 20]] * 2]  # of 18 to 22, which have one vote


def test_keys_are_read_in_pieces(monkeypatch):
    q, k, _ = tokens(90)
    spec = SoftVote(**SMALL, budget=9)
    before = choose(spec, q[:, :, -1:], k).entries
    widths = []
    keys = gather.keys
    monkeypatch.setattr(gather, "TEMPORARY", 7 * k[:, :, 0].numel())
    monkeypatch.setattr(gather, "keys", lambda of, low, high: widths.append(high - low) or keys(of, low, high))
    assert choose(spec, q[:, :, -1:], k).entries.tolist() == before.tolist()
    assert max(widths) == 7 and sum(widths) == 90 - OUTSIDE


@pytest.mark.parametrize("fields", [EVERY, {"similar": 0.1, "refresh": 32, "pool": 3}])
def test_padded_sequences_as_alone(fields):
    assert_rows_as_alone(SoftVote(**{**SMALL, "budget": 5, **fields}), (0, 3, 21), 50, 80)


def test_several_sequences_without_pads_choose_by_themselves():
    assert_rows_as_alone(SoftVote(**SMALL, budget=5, similar=0.1, refresh=16), (0, 0), 50, 80)


def test_what_it_refuses():
    refused(lambda: SoftVote(pool=4), "pool: got 4, expected an odd number")
    refused(lambda: SoftVote(refresh=1), "similar: got 0.9 with refresh 1", "or similar to null")
