"""The selection of antidiagonal against loops in Python."""

from __future__ import annotations

import pytest
import torch
from helpers import slow_blocks
from helpers.slow_blocks import BLOCK, CHUNKS, SIZES, fewest, query_blocks, random_qk, softmax

from hf_longctx.config.words import build
from hf_longctx.errors import ConfigError
from hf_longctx.prefill.antidiagonal import Antidiagonal
from hf_longctx.prefill.base import select


def slow(spec, q, k, scale):
    """Cells of stride x stride tokens: mean over the antidiagonal, softmax per row of cells, summed per block."""
    size, first, stride, listed = len(k), len(k) - len(q), spec.stride, []
    scores = (q @ k.T * scale).tolist()
    for block in query_blocks(q, k):
        sums = dict.fromkeys(range(block + 1), 0.0)
        for row in range(block * BLOCK // stride, (block + 1) * BLOCK // stride):
            present = [i for i in range(row * stride, (row + 1) * stride) if first <= i < size]
            if present:
                cells = {}
                for column in range(row + 1):
                    met = [(i, column * stride + row * stride + stride - 1 - i) for i in present]
                    cells[column] = sum(scores[i - first][j] for i, j in met if j < size) / len(present)
                for column, weight in softmax(cells).items():
                    sums[column * stride // BLOCK] += weight
        listed.append(fewest(sums, spec.threshold))
    return listed, set()


@pytest.mark.parametrize(
    "spec", [Antidiagonal(8, 0.6), Antidiagonal(16, 0.9), Antidiagonal(1, 0.5), Antidiagonal(64, 0)]
)
@pytest.mark.parametrize(("q_len", "kv_len"), SIZES + CHUNKS)
def test_selection_is_the_loop(q_len, kv_len, spec):
    q, k = random_qk(q_len, kv_len)
    slow_blocks.check(select((spec,), q, k, 0.9), slow, [spec], q, k, 0.9)


@pytest.mark.parametrize(("kv_heads", "group"), [(3, 1), (2, 4), (1, 7)])
def test_fields_differ_by_head(kv_heads, group, monkeypatch):
    specs = [Antidiagonal(8, 0.9), Antidiagonal(8, 0.3), Antidiagonal(32, 0.5)]
    slow_blocks.check_heads(monkeypatch, slow, specs, kv_heads, group)


def test_a_threshold_of_one_reads_everything():
    slow_blocks.check_everything(Antidiagonal(threshold=1.0))


def test_the_loops_see_a_wrong_selection():
    slow_blocks.check_wrong(slow, Antidiagonal(8, 0.7), Antidiagonal(8, 0.5))
    slow_blocks.check_wrong(slow, Antidiagonal(8, 0.7), Antidiagonal(16, 0.7))


def test_with_a_stride_of_one_the_share_is_the_attention():
    """Each cell is then one score, so that the blocks hold the share of the true weights."""
    q, k = random_qk(640, 640)
    visible = torch.ones(640, 640, dtype=torch.bool).tril()
    weights = (q[0, 0] @ k[0, 0].T * 0.9).masked_fill(~visible, float("-inf")).softmax(-1)
    per_block = weights.unflatten(0, (10, 64)).unflatten(2, (10, 64)).sum((1, 3)) / 64
    for threshold in (0.3, 0.6):
        lists = select((Antidiagonal(1, threshold),), q, k, 0.9)
        held = (per_block * lists.block_mask()[0, 0]).sum(-1)
        assert (held >= threshold).all() and (held < 0.9).any() and lists.density < 0.9


def test_equal_sums_go_to_the_lowest_index():
    q, k = random_qk(400, 400)
    spec = Antidiagonal(8, 0.5)
    lists = select((spec,), q, torch.zeros_like(k), 1.0)
    slow_blocks.check(lists, slow, [spec], q, torch.zeros_like(k), 1.0)
    assert lists.block_mask()[0, 0, 5].nonzero()[:, 0].tolist() == [0, 1, 2, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_scores_in_float32(dtype):
    slow_blocks.check_low_precision(Antidiagonal(8, 0.6), dtype)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"stride": 7}, r"prefill\.retrieval\.stride: got 7, supported: a divisor of 64"),
        ({"stride": 0}, r"prefill\.retrieval\.stride: got 0, expected a whole number, at least 1"),
        ({"stride": 128}, r"prefill\.retrieval\.stride: got 128, .*at most 64"),
        ({"threshold": 1.1}, r"prefill\.retrieval\.threshold: got 1\.1, .*at most 1"),
        ({"threshold": -0.1}, r"prefill\.retrieval\.threshold: got -0\.1, .*at least 0"),
        ({"block": 32}, r"prefill\.retrieval\.block: got 32, expected a whole number, one of 64 \(tokens\)"),
    ],
)
def test_wrong_fields_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        build("prefill", {"pattern": "antidiagonal", **fields}, "pattern", "prefill.retrieval")
    assert build("prefill", {"pattern": "antidiagonal"}, "pattern", "prefill.retrieval") == Antidiagonal(8, 0.9)
