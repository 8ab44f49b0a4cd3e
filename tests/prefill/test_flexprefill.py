"""The selection of flexprefill against loops in Python."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import slow_blocks
from helpers.slow_blocks import BLOCK, CHUNKS, SIZES, best, fewest, mean_of, query_blocks, random_qk, softmax
from helpers.slow_patterns import line_sums

from hf_longctx.config.words import build
from hf_longctx.errors import ConfigError
from hf_longctx.prefill.base import select
from hf_longctx.prefill.flexprefill import Flexprefill


def distance(by_key, q, k, scale) -> float:
    """Square root of the Jensen-Shannon divergence of the last queries' true and estimated weights per key block."""
    key_blocks, last = (len(k) - 1) // BLOCK + 1, q[-64:]
    true = [sum(by_key[j * BLOCK : (j + 1) * BLOCK]) / len(last) for j in range(key_blocks)]
    guess = softmax({j: float(last.mean(0) @ mean_of(k, 0, j)) * scale for j in range(key_blocks)})
    total = 0.0
    for p, g in zip(true, guess.values(), strict=True):
        total += sum(x * math.log(2 * x / (p + g)) / 2 for x in (p, g) if x > 0)
    return math.sqrt(max(total, 0))


def query_aware(spec, q, k, scale):
    """Pairs of blocks by the softmax of pooled scores, ranked together; and the best ones of each query block."""
    first, pairs, listed = len(k) - len(q), {}, []
    for block in query_blocks(q, k):
        scores = {(block, j): float(mean_of(q, first, block) @ mean_of(k, 0, j)) * scale for j in range(block + 1)}
        pairs |= softmax(scores)
        listed.append({j for _, j in best(scores, math.ceil(spec.min_budget / BLOCK))})
    for block, j in fewest(pairs, spec.gamma):
        listed[block - first // BLOCK].add(j)
    return listed, set()


def lines(spec, by_key, by_offset, q, k):
    """Columns and bands of 64 offsets that hold gamma of the last queries' weights, each at least min_budget tokens."""
    keys = dict(enumerate(by_key))
    columns = fewest(keys, spec.gamma) | best(keys, spec.min_budget)
    bands = {a: sum(by_offset[a * BLOCK : (a + 1) * BLOCK]) for a in range((len(k) - 1) // BLOCK + 1)}
    kept, listed = fewest(bands, spec.gamma), []
    for block in query_blocks(q, k):
        inside = {a: w for a, w in bands.items() if a <= block}
        found = (kept & set(inside)) | best(inside, math.ceil(spec.min_budget / BLOCK))
        listed.append({block - a for a in found} | {block - a - 1 for a in found if a < block})
    return listed, columns


def slow(spec, q, k, scale):
    by_key, by_offset = line_sums(q, k, scale)
    if distance(by_key, q, k, scale) < spec.tau:
        return query_aware(spec, q, k, scale)
    return lines(spec, by_key, by_offset, q, k)


AWARE, LINES = Flexprefill(0.6, 1.0, 1), Flexprefill(0.3, 0.0, 1)


@pytest.mark.parametrize("spec", [AWARE, LINES, Flexprefill(0.2, 1.0, 100), Flexprefill(0.05, 0.0, 100)])
@pytest.mark.parametrize(("q_len", "kv_len"), SIZES + CHUNKS)
def test_selection_is_the_loop(q_len, kv_len, spec):
    q, k = random_qk(q_len, kv_len)
    slow_blocks.check(select((spec,), q, k, 0.9), slow, [spec], q, k, 0.9)


def test_the_distance_decides():
    """Eight heads between whose distances tau lies, in two rows: some heads are query-aware in one of them only."""
    q, k = random_qk(300, 300, 8, 1, batch=2)
    flat = torch.linspace(0.01, 1, 8)  # flat attention is easy to estimate
    q = q * torch.stack([flat, flat.flip(0)])[:, :, None, None]
    heads = [(row, h) for row in range(2) for h in range(8)]
    found = [distance(line_sums(q[at], k[at], 0.9)[0], q[at], k[at], 0.9) for at in heads]
    tau = sum(sorted(found)[7:9]) / 2
    for gamma in (0.3, 0.9):
        specs = (Flexprefill(gamma, tau, 1),) * 8
        lists = select(specs, q, k, 0.9)
        slow_blocks.check(lists, slow, specs, q, k, 0.9)
        aware = lists.column_counts == 0
        assert aware.flatten().tolist() == [d < tau for d in found] and aware.sum() == 8
        assert (aware[0] != aware[1]).any()


def test_weights_of_zero_have_a_distance():
    """One query that looks at one key: most blocks have a weight of 0, true and estimated."""
    q, k = random_qk(1, 400)
    lists = select((AWARE,), q * 1000, k, 0.9)
    assert lists.column_counts.item() == 0
    slow_blocks.check(lists, slow, [AWARE], q * 1000, k, 0.9)


@pytest.mark.parametrize(("kv_heads", "group"), [(3, 1), (2, 4), (1, 7)])
def test_fields_differ_by_head(kv_heads, group, monkeypatch):
    specs = [AWARE, LINES, Flexprefill(0.9, 0.3, 1), Flexprefill(0.1, 0.0, 70)]
    slow_blocks.check_heads(monkeypatch, slow, specs, kv_heads, group)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_everything_reads_everything(tau):
    slow_blocks.check_everything(Flexprefill(1.0, tau, 1))
    slow_blocks.check_everything(Flexprefill(0.1, tau, 10**9))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (AWARE, Flexprefill(0.5, 1.0, 1)),
        (LINES, Flexprefill(0.25, 0.0, 1)),
        (LINES, AWARE),
        (AWARE, LINES),
        (Flexprefill(0.1, 1.0, 65), Flexprefill(0.1, 1.0, 64)),
        (Flexprefill(0.1, 0.0, 65), Flexprefill(0.1, 0.0, 64)),
    ],
)
def test_the_loops_see_a_wrong_selection(right, wrong):
    slow_blocks.check_wrong(slow, right, wrong)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_every_query_block_reads_its_budget(tau):
    q, k = random_qk(450, 600)
    least = torch.tensor([min(7, i + 1) for i in range(2, 10)])
    assert (select((Flexprefill(0.0, tau, 400),), q, k, 0.9).counts[0, 0] >= least).all()
    assert not (select((Flexprefill(0.0, tau, 1),), q, k, 0.9).counts[0, 0] >= least).all(), "a control"


def test_lines_hold_gamma_of_the_last_queries():
    q, k = random_qk(640, 640)
    last = (
        (q[0, 0, -64:] @ k[0, 0].T * 0.9).masked_fill(~torch.ones(64, 640).tril(576).bool(), float("-inf")).softmax(-1)
    )
    for gamma in (0.2, 0.7):
        visible = select((Flexprefill(gamma, 0.0, 1),), q, k, 0.9).visible(576, 640)[0, 0]
        assert (last * visible).sum() / 64 >= gamma
        assert not visible.all()


def test_equal_weights_go_to_the_lowest_index():
    """Keys of zeros: 3 query blocks and half of the fourth make up 49% of the pairs, and the oldest keys are best."""
    q, k = random_qk(400, 400)
    specs = (Flexprefill(0.49, 1.0, 1), Flexprefill(0.33, 0.0, 1))
    aware, lines = (select((spec,), q, torch.zeros_like(k), 1.0) for spec in specs)
    assert [row.nonzero()[:, 0].tolist() for row in aware.block_mask()[0, 0, 2:5]] == [[0, 1, 2], [0, 1, 3], [0, 4]]
    assert lines.columns[0, 0].tolist() == list(range(64, 64 + lines.columns.shape[2])) and lines.columns.shape[2] > 50


@pytest.mark.parametrize("spec", [AWARE, LINES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_scores_in_float32(dtype, spec):
    slow_blocks.check_low_precision(spec, dtype)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"gamma": 1.1}, r"prefill\.retrieval\.gamma: got 1\.1, .*at most 1"),
        ({"tau": -1}, r"prefill\.retrieval\.tau: got -1, .*at least 0"),
        ({"min_budget": 0}, r"prefill\.retrieval\.min_budget: got 0, .*at least 1 \(tokens\)"),
        ({"block": 128}, r"prefill\.retrieval\.block: got 128, expected a whole number, one of 64 \(tokens\)"),
    ],
)
def test_wrong_fields_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        build("prefill", {"pattern": "flexprefill", **fields}, "pattern", "prefill.retrieval")
    assert build("prefill", {"pattern": "flexprefill"}, "pattern", "prefill.retrieval") == Flexprefill(0.95, 0.1, 1024)
