"""What the loop-written block patterns share, and the checks that hold every one of them to its loops."""

from __future__ import annotations

import pytest
import torch

from hf_longctx.kernels import reference
from hf_longctx.prefill import _blocks
from hf_longctx.prefill.base import select

BLOCK = 64
SIZES = [(1, 1), (63, 63), (64, 64), (65, 65), (129, 129), (200, 200), (400, 400)]
CHUNKS = [(1, 200), (40, 200), (65, 193), (10, 70), (128, 320), (130, 257)]


def random_qk(q_len, kv_len, kv_heads=1, group=1, batch=1, dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(kv_len + 1000 * seed)
    q = torch.randn(batch, kv_heads * group, q_len, 8, generator=make, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, kv_len, 8, generator=make, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


def query_blocks(q, k) -> range:
    """The blocks that the last len(q) of len(k) tokens touch."""
    return range((len(k) - len(q)) // BLOCK, (len(k) - 1) // BLOCK + 1)


def mean_of(x, first, block):
    """The mean of the tokens of a block; x ``[T, D]`` begins at row position ``first``."""
    there = [x[p - first] for p in range(block * BLOCK, (block + 1) * BLOCK) if first <= p < first + len(x)]
    return sum(there) / len(there)


def best(weights: dict, budget: int) -> set:
    return set(sorted(weights, key=lambda place: (-weights[place], place))[:budget])


def fewest(weights: dict, share: float) -> set:
    """The smallest set of places whose weights reach a share of all."""
    total, reached, found = sum(weights.values()), 0.0, set()
    for place in sorted(weights, key=lambda place: (-weights[place], place)):
        if reached >= share * total:
            break
        found.add(place)
        reached += weights[place]
    return found


def softmax(scores: dict) -> dict:
    weights = torch.tensor(list(scores.values()), dtype=torch.float64).softmax(0).tolist()
    return dict(zip(scores, weights, strict=True))


def check(lists, slow, specs, q, k, scale) -> None:
    """``slow(spec, q, k, scale)`` gives the key blocks of every query block and the columns of one head."""
    group = q.shape[1] // k.shape[1]
    assert lists.counts.shape == (*q.shape[:2], len(query_blocks(q[0, 0], k[0, 0])))
    for row in range(q.shape[0]):
        for head, spec in enumerate(specs):
            listed, columns = slow(spec, q[row, head], k[row, head // group], scale)
            want = [found | {0, block} for found, block in zip(listed, query_blocks(q[0, 0], k[0, 0]), strict=True)]
            got = [set(blocks.nonzero()[:, 0].tolist()) for blocks in lists.block_mask()[row, head]]
            assert got == want
            assert set(lists.column_mask()[row, head].nonzero()[:, 0].tolist()) == {c for c in columns if c >= BLOCK}


def check_heads(monkeypatch, slow, specs, kv_heads, group, q_len=131, kv_len=290) -> None:
    """Heads with different fields: each as the loops say and as alone, whatever the pieces, in every run."""
    q, k = random_qk(q_len, kv_len, kv_heads, group, batch=2)
    specs = tuple(specs[h % len(specs)] for h in range(kv_heads * group))
    lists = select(specs, q, k, 0.9)
    check(lists, slow, specs, q, k, 0.9)
    alone = [select((s,), q[:, h : h + 1], k[:, h // group][:, None], 0.9) for h, s in enumerate(specs)]
    assert torch.equal(lists.visible(), torch.cat([one.visible() for one in alone], 1))
    for temporary in (1 << 24, 1):
        monkeypatch.setattr(_blocks, "TEMPORARY", temporary)
        again = select(specs, q, k, 0.9)
        assert torch.equal(again.block_mask(), lists.block_mask())
        assert torch.equal(again.column_mask(), lists.column_mask())
    assert len({tuple(one) for one in lists.visible().sum((0, 3)).tolist()}) > 1, "heads that differ"


def check_everything(spec) -> None:
    """A budget of everything reads every visible key."""
    for q_len, kv_len in [(1, 1), (129, 129), (400, 400), (130, 257)]:
        q, k = random_qk(q_len, kv_len, 2, 2, batch=2)
        lists = select((spec,) * 4, q * 1000, k, 0.9)  # sharp: most weights underflow to 0
        assert torch.equal(lists.visible(), reference.causal_visible(q_len, kv_len).expand_as(lists.visible()))
        assert lists.density == 1.0


def check_wrong(slow, right, wrong) -> None:
    """The loops tell two specs apart."""
    q, k = random_qk(500, 500)
    lists = select((right,), q, k, 0.9)
    check(lists, slow, [right], q, k, 0.9)
    assert lists.density < 1
    with pytest.raises(AssertionError):
        check(lists, slow, [wrong], q, k, 0.9)


def check_low_precision(spec, dtype) -> None:
    """Scores of low precision are float32, under autocast too; keys that are rounded further choose otherwise."""
    q, k = random_qk(600, 1300, 2, 2, dtype=dtype)
    want = select((spec,) * 4, q.float(), k.float(), 0.9)
    got = select((spec,) * 4, q, k, 0.9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = select((spec,) * 4, q, k, 0.9)
    rounded = select((spec,) * 4, q, (k.float() * 4).round() / 4, 0.9)
    for lists, equal in ((got, True), (cast, True), (rounded, False)):
        assert torch.equal(lists.visible(), want.visible()) is equal
