"""The selection of vertical_slash against loops in Python."""

from __future__ import annotations

import pytest
import torch
from helpers.calls import sparse
from helpers.slow_patterns import mask_of, pattern_mask, vertical_slash

from hf_longctx.kernels import reference
from hf_longctx.prefill import _blocks
from hf_longctx.prefill import vertical_slash as module
from hf_longctx.prefill.base import select
from hf_longctx.prefill.vertical_slash import VerticalSlash


def random_qk(q_len, kv_len, kv_heads=1, group=1, batch=1, dtype=torch.float64):
    make = torch.Generator().manual_seed(kv_len)
    q = torch.randn(batch, kv_heads * group, q_len, 8, generator=make, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, kv_len, 8, generator=make, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


def check(lists, q, k, scale, budgets) -> None:
    """The lists of every row and head are those of the loops."""
    group = q.shape[1] // k.shape[1]
    visible = lists.visible()
    for row in range(q.shape[0]):
        for head, budget in enumerate(budgets):
            listed, columns = vertical_slash(q[row, head], k[row, head // group], scale, *budget)
            got = [set(blocks.nonzero()[:, 0].tolist()) for blocks in lists.block_mask()[row, head]]
            assert got == listed
            assert set(lists.column_mask()[row, head].nonzero()[:, 0].tolist()) == {c for c in columns if c >= 64}
            assert torch.equal(visible[row, head], mask_of(listed, columns, q.shape[2], k.shape[2]))


SIZES = [(1, 1), (63, 63), (64, 64), (65, 65), (127, 127), (128, 128), (129, 129), (257, 257), (400, 400)]
CHUNKS = [(1, 200), (40, 200), (64, 192), (65, 193), (128, 300), (130, 257)]


@pytest.mark.parametrize("budget", [(1, 1), (20, 3), (5, 70)])
@pytest.mark.parametrize(("q_len", "kv_len"), SIZES + CHUNKS)
def test_selection_is_the_loop(q_len, kv_len, budget):
    q, k = random_qk(q_len, kv_len)
    check(select((VerticalSlash(*budget),), q, k, 0.9), q, k, 0.9, [budget])


@pytest.mark.parametrize(("kv_heads", "group"), [(3, 1), (2, 4), (1, 7)])
@pytest.mark.parametrize("temporary", [1 << 24, 1])
def test_budgets_differ_by_head(kv_heads, group, temporary, monkeypatch):
    monkeypatch.setattr(_blocks, "TEMPORARY", temporary)
    q, k = random_qk(131, 290, kv_heads, group, batch=2)
    budgets = [(1 + 9 * h, 1 + 2 * h) for h in range(kv_heads * group)]
    lists = select(tuple(VerticalSlash(*budget) for budget in budgets), q, k, 0.9)
    check(lists, q, k, 0.9, budgets)
    alone = [
        select((VerticalSlash(*b),), q[:, h : h + 1], k[:, h // group][:, None], 0.9) for h, b in enumerate(budgets)
    ]
    assert torch.equal(lists.visible(), torch.cat([one.visible() for one in alone], 1))
    assert not torch.equal(lists.column_counts[:, 0], lists.column_counts[:, -1])


def test_equal_sums_go_to_the_lowest_index():
    """Keys of zeros: every query gives all keys the same weight, so the oldest keys and nearest offsets are best."""
    q, k = random_qk(400, 400)
    lists = select((VerticalSlash(70, 1),), q, torch.zeros_like(k), 1.0)
    assert lists.columns[0, 0].tolist() == list(range(64, 70))
    check(lists, q, torch.zeros_like(k), 1.0, [(70, 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_sums_in_float32(dtype):
    q, k = random_qk(200, 333, dtype=dtype)
    columns, offsets = module.line_sums(q[:, :, -64:], k, 0.9)
    want = module.line_sums(q[:, :, -64:].float(), k.float(), 0.9)
    assert columns.dtype == offsets.dtype == torch.float32
    torch.testing.assert_close((columns, offsets), want)
    torch.testing.assert_close(columns.sum(), torch.tensor(64.0))
    torch.testing.assert_close(offsets.sum(), torch.tensor(64.0))


@pytest.mark.parametrize("budget", [(10**9, 1), (1, 10**9), (10**9, 10**9)])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (129, 129), (400, 400), (130, 257)])
def test_budgets_of_everything_read_everything(q_len, kv_len, budget):
    q, k = random_qk(q_len, kv_len, 2, 2, batch=2)
    visible = select((VerticalSlash(*budget),) * 4, q, k, 0.9).visible()
    assert torch.equal(visible, reference.causal_visible(q_len, kv_len).expand_as(visible))


def test_the_loops_see_a_wrong_selection():
    q, k = random_qk(300, 300)
    with pytest.raises(AssertionError):
        check(select((VerticalSlash(20, 4),), q, k, 0.9), q, k, 0.9, [(19, 4)])
    with pytest.raises(AssertionError):
        check(select((VerticalSlash(20, 1),), q, k, 0.9), q, k, 0.9, [(20, 60)])
    q, k = random_qk(500, 500)
    assert not torch.equal(pattern_mask(q[0], k[0], 0.9, [(5, 2)])[0], reference.causal_visible(500, 500))


def test_autocast_rounds_no_scores():
    q, k = random_qk(300, 700, 2, 2, dtype=torch.bfloat16)
    lists = select((VerticalSlash(9, 3),) * 4, q, k, 0.9)
    want, exact = sparse(reference, q, k, k, lists, 0.9), module.line_sums(q[:, :, -64:], k, 0.9)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(select((VerticalSlash(9, 3),) * 4, q, k, 0.9).visible(), lists.visible())
        assert torch.equal(sparse(reference, q, k, k, lists, 0.9), want)
        assert not torch.equal(module.line_sums(q[:, :, -64:], k, 0.9)[0], exact), "a control: here it rounds"
