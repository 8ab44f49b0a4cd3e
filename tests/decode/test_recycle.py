"""``select: recycle`` reads everything at full steps, and between them what had most attention there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.caches import read
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
from helpers.tiny import config_for, tiny_model

from hf_longctx import LongCtxCache, patch_model, report, unpatch_model
from hf_longctx.decode.recycle import Recycle


def is_full(spec: Recycle, q, last: int | None, position: int) -> bool:
    if last is None or last // spec.refresh != position // spec.refresh:
        return True
    if spec.similar is None or position % spec.check:
        return False
    cosine = torch.cosine_similarity(q[0, :, last].flatten(), q[0, :, position].flatten(), dim=0)
    return bool(cosine < spec.similar)


def loop(spec: Recycle, qkv, prompt: int) -> list[list[set[int]]]:
    """The positions that each token after the prompt reads, by KV head."""
    q, k, _ = qkv
    group = q.shape[1] // k.shape[1]
    last, chosen, edge = None, [], 0
    read = []
    for position in range(prompt, q.shape[2]):
        high = position + 1 - spec.recent
        if high - spec.sink <= spec.budget:
            read.append([set(range(position + 1))] * k.shape[1])
        elif is_full(spec, q, last, position):
            read.append([set(range(position + 1))] * k.shape[1])
            last, edge, chosen = position, high, []
            for head in range(k.shape[1]):
                own = [
                    (k[0, head, :position] @ q[0, head * group + g, position] * SCALE).softmax(0) for g in range(group)
                ]
                most = [max(float(weights[at]) for weights in own) for at in range(spec.sink, high)]
                chosen.append(top(most, spec.budget, spec.sink))
        else:
            read.append([one | outside(spec, position, edge) for one in chosen])
    return read


@pytest.mark.parametrize("more", [1, 5, 63])  # tokens between sinks and newest ones
@pytest.mark.parametrize(
    "fields",
    [{"refresh": 7}, {"refresh": 50}, {"refresh": 16, "similar": 0.1}, {"refresh": 64, "similar": 0.3, "check": 3}],
)
def test_reads_what_the_steps_of_the_method_say(more, fields):
    spec = Recycle(budget=5, **SMALL, **fields)
    prompt = OUTSIDE + more
    qkv = tokens(prompt + 40)
    listed = loop(spec, qkv, prompt)
    out, counts = decoded(spec, qkv, prompt)
    assert_same(out, over(qkv, prompt, listed))
    ran = [by_head for at, by_head in enumerate(listed) if prompt + at + 1 - OUTSIDE > spec.budget]
    assert sum(int(part) for part in counts.reads.values()) == sum(len(one) for by_head in ran for one in by_head)
    full = sum(len(by_head[0]) == prompt + at + 1 for at, by_head in enumerate(listed))
    assert counts.chosen == full - (40 - len(ran))
    assert counts.reused == len(ran) - counts.chosen > 0


@pytest.mark.parametrize("wrong", [{"refresh": 8}, {"budget": 6}, {"sink": 5}])
def test_the_loop_can_differ(wrong):
    fields = {**SMALL, "budget": 5, "refresh": 7}
    qkv = tokens(80)
    out, _ = decoded(Recycle(**fields), qkv, 40)
    assert (out - over(qkv, 40, loop(Recycle(**{**fields, **wrong}), qkv, 40))).abs().max() > 1e-3


@pytest.mark.parametrize("fields", [{"budget": 5, "refresh": 1}, {"budget": 100}, {"share": 1.0}])
def test_its_limits_are_dense(fields):
    qkv = tokens(90)
    assert_same(decoded(Recycle(**SMALL, **fields), qkv, 40)[0], dense(qkv, 40))


def test_with_one_query_forever_it_reads_the_top_of_its_softmax():
    spec = Recycle(budget=5, refresh=64, **SMALL)
    qkv = tokens(63, heads=2)
    q, k, v = qkv
    q[:] = q[:, :, 40:41]
    out, _ = decoded(spec, (q, k, v), 40)
    weights = (k[0] @ q[0, :, 40, :, None] * SCALE).squeeze(2)[:, :40].softmax(1)
    high = 41 - spec.recent
    chosen = [set((weights[head, 4:high].topk(5).indices + 4).tolist()) for head in (0, 1)]
    read = [[set(range(41))] * 2]
    read += [[one | outside(spec, position, high) for one in chosen] for position in range(41, 63)]
    assert_same(out, over((q, k, v), 40, read))


def test_the_largest_weight_of_a_group_counts():
    spec = Recycle(budget=1, **SMALL)
    q, k = torch.zeros(1, 2, 1, 2, dtype=torch.float64), torch.zeros(1, 1, 32, 2, dtype=torch.float64)
    q[0, 0, 0, 0], q[0, 1, 0, 1] = 40, 1
    k[0, 0, 10, 0] = 1  # nearly all of the first head's attention
    k[0, 0, 12:20, 1] = 90  # larger products, each an eighth of the second head's attention
    assert choose(spec, q, k).entries.tolist() == [[[10]]]


def test_equal_weights_go_to_the_first_tokens():
    q, k, _ = tokens(50)
    assert choose(Recycle(budget=6, **SMALL), q[:, :, -1:] * 0, k).entries.tolist() == [[[4, 5, 6, 7, 8, 9]] * 2]


@pytest.mark.parametrize("fields", [{"refresh": 7}, {"refresh": 32, "similar": 0.1, "check": 2}])
def test_padded_sequences_as_alone(fields):
    assert_rows_as_alone(Recycle(budget=5, **SMALL, **fields), (0, 3, 21), 50, 80)


@pytest.mark.parametrize("kernel", ["auto", "cpu"])
def test_full_steps_of_a_model_by_other_kernels(kernel):
    model = tiny_model(head_dim=16)
    ids = torch.randint(3, 97, (1, 90))
    answers = []
    for word in (kernel, "reference"):
        select = {"select": "recycle", "budget": 5, "refresh": 8, **SMALL}
        patch_model(model, config_for(model, kernel=word, decode={"retrieval": select}))
        cache = LongCtxCache(model)
        read(model, cache, ids[:, :40])
        answers.append(torch.stack([read(model, cache, ids[:, at : at + 1]) for at in range(40, 90)]))
        counts = report(model)
        answers.append((counts.chosen, counts.reused, counts.read))
        unpatch_model(model)
    torch.testing.assert_close(answers[0], answers[2], rtol=0, atol=1e-3)
    assert answers[1] == answers[3] and answers[1][0] == 7 * 3


def test_the_list_of_a_full_step_has_everything():
    q, k, _ = tokens(50)
    chosen = choose(Recycle(budget=6, **SMALL), q[:, :, -1:], k)
    assert chosen.whole and chosen.blocks(49).visible().all()
    again = dataclasses.replace(chosen, whole=False).blocks(49).visible()
    assert again.sum().item() == 2 * (OUTSIDE + 6)


def test_check_needs_something_to_compare():
    refused(lambda: Recycle(check=5), "check: got 5 without similar", "leave check out")
