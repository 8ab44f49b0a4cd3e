"""The selection of block_topk against loops in Python."""

from __future__ import annotations

import pytest
import torch
from helpers import slow_blocks
from helpers.slow_blocks import CHUNKS, SIZES, best, mean_of, query_blocks, random_qk

from hf_longctx.config.words import build
from hf_longctx.errors import ConfigError
from hf_longctx.prefill.base import select
from hf_longctx.prefill.block_topk import BlockTopk

pytestmark = pytest.mark.quick


def slow(spec, q, k, scale):
    """Per query block the top_k key blocks by mean query times mean key, of those that are not later."""
    first, listed = len(k) - len(q), []
    for block in query_blocks(q, k):
        scores = {j: float(mean_of(q, first, block) @ mean_of(k, 0, j)) * scale for j in range(block + 1)}
        listed.append(best(scores, spec.top_k))
    return listed, set()


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize(("q_len", "kv_len"), SIZES + CHUNKS)
def test_selection_is_the_loop(q_len, kv_len, top_k):
    q, k = random_qk(q_len, kv_len)
    slow_blocks.check(select((BlockTopk(top_k),), q, k, 0.9), slow, [BlockTopk(top_k)], q, k, 0.9)


@pytest.mark.parametrize(("kv_heads", "group"), [(3, 1), (2, 4), (1, 7)])
def test_budgets_differ_by_head(kv_heads, group, monkeypatch):
    slow_blocks.check_heads(monkeypatch, slow, [BlockTopk(1), BlockTopk(2), BlockTopk(4)], kv_heads, group)


def test_budgets_of_everything_read_everything():
    slow_blocks.check_everything(BlockTopk(10**9))


def test_the_loops_see_a_wrong_selection():
    slow_blocks.check_wrong(slow, BlockTopk(3), BlockTopk(4))


def test_a_partial_block_is_the_mean_of_its_tokens():
    """One token of its last block, as good as the best whole block: among zeros it would be 64 times worse."""
    q, k = torch.zeros(1, 1, 321, 2), torch.zeros(1, 1, 321, 2)
    q[..., 0], k[..., 64:128, 0], k[..., 256:320, 0], k[..., 320, 0] = 1, 1, 1.5, 2
    assert select((BlockTopk(1),), q, k, 1.0).block_mask()[0, 0, 5].nonzero()[:, 0].tolist() == [0, 5]
    assert select((BlockTopk(2),), q, k, 1.0).block_mask()[0, 0, 5].nonzero()[:, 0].tolist() == [0, 4, 5]
    assert select((BlockTopk(3),), q, k, 1.0).block_mask()[0, 0, 5].nonzero()[:, 0].tolist() == [0, 1, 4, 5]
    assert torch.equal(
        select((BlockTopk(3),), q[:, :, 320:], k, 1.0).counts[0, 0], torch.tensor([4], dtype=torch.int32)
    )


def test_equal_scores_go_to_the_lowest_index():
    q, k = random_qk(400, 400)
    found = select((BlockTopk(3),), q, torch.zeros_like(k), 1.0).block_mask()[0, 0]
    assert [row.nonzero()[:, 0].tolist() for row in found[4:]] == [[0, 1, 2, 4], [0, 1, 2, 5], [0, 1, 2, 6]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_scores_in_float32(dtype):
    slow_blocks.check_low_precision(BlockTopk(3), dtype)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"top_k": 0}, r"prefill\.retrieval\.top_k: got 0, expected a whole number, at least 1 \(blocks\)"),
        ({"top_k": 1.5}, r"prefill\.retrieval\.top_k: got 1\.5"),
        ({"block": 128}, r"prefill\.retrieval\.block: got 128, expected a whole number, one of 64 \(tokens\)"),
        ({"topk": 3}, r"prefill\.retrieval\.topk: unknown key.*top_k"),
    ],
)
def test_wrong_fields_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        build("prefill", {"pattern": "block_topk", **fields}, "pattern", "prefill.retrieval")
    assert build("prefill", {"pattern": "block_topk", "block": 64}, "pattern", "prefill.retrieval") == BlockTopk(100)
