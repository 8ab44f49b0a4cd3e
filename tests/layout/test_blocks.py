"""BlockList: what it lists, what is visible, how dense it is; and the slow kernel that reads it."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from helpers.block_lists import SIZES, block_list, random_masks
from helpers.calls import dense, sparse
from helpers.device_reads import CountReads
from torch.utils._python_dispatch import TorchDispatchMode

from hf_longctx.kernels import reference
from hf_longctx.layout import blocks as layout
from hf_longctx.layout.blocks import BlockList


def sees(blocks, columns, block, first, b, h, i, j) -> bool:
    """The rule, for row position i and key j."""
    own = i // block
    listed = bool(blocks[b, h, own - first // block, j // block]) and j // block <= own
    return j <= i and (listed or (bool(columns[b, h, j]) and j < own * block))


def loop_visible(blocks, columns, block, first, kv_len):
    batch, heads = blocks.shape[:2]
    mask = torch.zeros(batch, heads, kv_len - first, kv_len, dtype=torch.bool)
    for b, h, t, j in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        mask[b, h, t, j] = sees(blocks, columns, block, first, b, h, first + t, j)
    return mask


@pytest.mark.quick
@pytest.mark.parametrize(("first", "kv_len", "block"), SIZES[:7])
def test_visible_is_the_rule(first, kv_len, block):
    blocks, columns = random_masks(first, kv_len, block)
    made = BlockList.from_mask(blocks, columns, block=block, first=first, kv_len=kv_len)
    want = loop_visible(blocks, columns, block, first, kv_len)
    assert torch.equal(made.visible(), want)
    for low in range(kv_len - first):
        for high in range(low + 1, kv_len - first + 1):
            assert torch.equal(made.visible(low, high, slice(1, 3)), want[:, 1:3, low:high])


@pytest.mark.parametrize(("first", "kv_len", "block"), SIZES)
def test_lists_are_ascending_and_zero_after_their_counts(first, kv_len, block, monkeypatch):
    blocks, columns = random_masks(first, kv_len, block)
    made = BlockList.from_mask(blocks, columns, block=block, first=first, kv_len=kv_len)
    assert {t.dtype for t in (made.indices, made.counts, made.columns, made.column_counts)} == {torch.int32}
    pairs = [(made.indices, made.counts, blocks), (made.columns, made.column_counts, columns)]
    for places, counts, mask in pairs:
        assert places.shape[-1] == counts.max()
        for got, count, row in zip(places.flatten(0, -2), counts.flatten(), mask.flatten(0, -2), strict=True):
            assert (got[count:] == 0).all()
            assert got[:count].tolist() == sorted(set(got[:count].tolist()))
            assert set(got[:count].tolist()) <= set(row.nonzero()[:, 0].tolist())
    causal = torch.arange(blocks.shape[3]) <= torch.arange(first // block, blocks.shape[3])[:, None]
    assert torch.equal(made.block_mask(), blocks & causal)
    assert torch.equal(made.column_mask(), columns)
    monkeypatch.setattr(layout, "TEMPORARY", 1)
    assert torch.equal(block_list(first, kv_len, block).indices, made.indices)
    assert made.reads == block_list(first, kv_len, block).reads


@pytest.mark.parametrize(("first", "kv_len", "block"), SIZES[:7])
def test_density_counts_what_is_read(first, kv_len, block):
    blocks, columns = random_masks(first, kv_len, block)
    made = BlockList.from_mask(blocks, columns, block=block, first=first, kv_len=kv_len)
    read, causal = Fraction(0), 0
    for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
        for row, i in enumerate(range(first // block, blocks.shape[3])):
            listed = [j for j in range(i + 1) if blocks[b, h, row, j]]
            alone = [c for c in range(i * block) if columns[b, h, c] and c // block not in listed]
            read += len(listed) + Fraction(len(alone), block)
            causal += i + 1
    assert Fraction(int(made.reads), made.causal) == read / causal
    assert made.density == float(read / causal)


def test_density_of_everything_is_one_and_of_a_column_a_share_of_a_block():
    every = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    full = BlockList.from_mask(every, block=4, first=0, kv_len=12)
    assert full.density == 1.0
    assert full.columns.shape == (1, 1, 0)
    diagonal, column = torch.eye(3, dtype=torch.bool)[None, None], torch.zeros(1, 1, 12, dtype=torch.bool)
    column[..., [1, 9]] = True  # 9 lies in the last block, before which no query block begins after it
    one = BlockList.from_mask(diagonal, column, block=4, first=0, kv_len=12)
    assert one.density == (3 + 2 / 4) / 6


def test_counting_what_is_read_waits_for_nothing_and_makes_no_mask():
    """The report asks for it in every layer."""
    many = torch.zeros(2, 4, 40, 40, dtype=torch.bool)
    many[..., [0, 3, 5]] = True
    columns = torch.zeros(2, 4, 160, dtype=torch.bool)
    columns[..., ::9] = True
    made = BlockList.from_mask(many, columns, block=4, first=0, kv_len=160)
    with CountReads() as host, Largest() as largest:
        reads = made.reads
    assert host.reads == 0
    assert largest.entries <= max(made.indices.numel(), 2 * 4 * 41) < many.numel()
    with CountReads() as host, Largest() as largest:
        assert made.density == reads.item() / made.causal
        made.block_mask()
    assert host.reads == 2 and largest.entries >= many.numel(), "a control"


@pytest.mark.parametrize(("first", "kv_len", "block"), SIZES)
@pytest.mark.parametrize("group", [1, 2, 4])
def test_sharing_a_group_is_the_union(first, kv_len, block, group):
    made = block_list(first, kv_len, block)
    shared = made.share_groups(group)
    assert shared.counts.shape[1] == 4 // group
    union = made.visible().unflatten(1, (-1, group)).any(2)
    assert torch.equal(shared.visible(), union)
    if group == 4 and kv_len > 9:
        assert not torch.equal(shared.visible(), made.visible()[:, :1])


def random_qkv(q_len, kv_len, kv_heads, group, dtype=torch.float64, dim=5):
    make = torch.Generator().manual_seed(kv_len)
    shapes = [(2, kv_heads * group, q_len, dim), (2, kv_heads, kv_len, dim), (2, kv_heads, kv_len, dim)]
    return [torch.randn(shape, generator=make, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize(("first", "kv_len", "block"), [*SIZES, (200, 329, 64), (0, 700, 64)])
def test_sparse_prefill_is_attention_with_the_mask(first, kv_len, block, group):
    made = block_list(first, kv_len, block, heads=2 * group)
    q, k, v = random_qkv(kv_len - first, kv_len, 2, group)
    want = reference.attention(q, k, v, made.visible(), 0.7)[0]
    got = sparse(reference, q, k, v, made, 0.7)
    assert (got - want).abs().max() <= 1e-12
    shared = made.share_groups(group)
    want = reference.attention(q, k, v, shared.visible().repeat_interleave(group, 1), 0.7)[0]
    assert (sparse(reference, q, k, v, shared, 0.7) - want).abs().max() <= 1e-12


@pytest.mark.quick
def test_a_dropped_block_or_column_is_seen():
    blocks, columns = random_masks(0, 300, 64)
    q, k, v = random_qkv(300, 300, 2, 2)
    made = BlockList.from_mask(blocks, columns, block=64, first=0, kv_len=300)
    want = reference.attention(q, k, v, made.visible(), 0.7)[0]
    fewer = blocks.clone()
    fewer[0, 1, 4, 4] = False
    less = BlockList.from_mask(fewer, columns, block=64, first=0, kv_len=300)
    assert (sparse(reference, q, k, v, less, 0.7) - want).abs().max() > 1e-3
    blocks[0, 1, :, 0] = False
    made = BlockList.from_mask(blocks, columns, block=64, first=0, kv_len=300)
    want = reference.attention(q, k, v, made.visible(), 0.7)[0]
    columns[0, 1, columns[0, 1].nonzero()[0]] = False
    less = BlockList.from_mask(blocks, columns, block=64, first=0, kv_len=300)
    assert (sparse(reference, q, k, v, less, 0.7) - want).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparse_prefill_in_low_precision(dtype):
    made = block_list(70, 200, 64)
    q, k, v = random_qkv(130, 200, 2, 2, dtype)
    got = sparse(reference, q, k, v, made, 0.7)
    want = reference.attention(q, k, v, made.visible(), 0.7)[0]
    assert got.dtype == dtype
    torch.testing.assert_close(got, want)


@pytest.mark.quick
def test_gradients_are_right():
    made = block_list(3, 9, 4, batch=1, heads=2)
    q, k, v = (x[:1].clone().requires_grad_() for x in random_qkv(6, 9, 1, 2, dim=3))
    assert torch.autograd.gradcheck(lambda *qkv: sparse(reference, *qkv, made, 0.7), (q, k, v))


class Largest(TorchDispatchMode):
    """Entries of the largest tensor made inside."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


def test_no_mask_is_as_large_as_the_prompt_squared():
    size = 1500
    made = block_list(0, size, 64, batch=1)
    q, k, v = (x[:1] for x in random_qkv(size, size, 2, 2))
    with Largest() as listed:
        sparse(reference, q, k, v, made, 0.7)
    assert size <= listed.entries <= reference.PIECE * size
    with Largest() as whole:
        dense(reference, q, k, v, 0.7)
    assert whole.entries >= size * size, "a control: the mode must see a whole matrix"
