"""The cpu kernel's sparse_prefill against the slow definition in float64, what it reads, and what it holds."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.block_lists import block_list, random_masks, random_qkv, rebuilt, toggled
from helpers.calls import sparse
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from hf_longctx.errors import UnsupportedModeError
from hf_longctx.kernels import _sparse_cpu, cpu, reference
from hf_longctx.kernels import base as dispatch
from hf_longctx.layout.blocks import BlockList

TOLERANCE = 1e-12
PROMPTS = [1, 63, 64, 65, 127, 129, 200, 513]
CHUNKS = [(63, 64), (64, 65), (1, 130), (70, 200), (128, 192), (200, 329), (130, 513)]  # (first, kv_len)
GROUPS = [1, 4, 7, 8]


def error(made: BlockList, qkv, scale=0.7) -> float:
    got, want = sparse(cpu, *qkv, made, scale), sparse(reference, *qkv, made, scale)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    return float((got - want).abs().max())


def check(made: BlockList, group: int, **kwargs) -> None:
    """Equal to the definition, and not to that of a list that differs in one block."""
    qkv = random_qkv(made, group, **kwargs)
    assert error(made, qkv) <= TOLERANCE
    want = sparse(reference, *qkv, toggled(made), 0.7)
    assert (sparse(cpu, *qkv, made, 0.7) - want).abs().max() > 1e-4


@pytest.fixture(params=[True, False], ids=["flash_lse", "attend"])
def any_lse(request, monkeypatch):
    """Run with and without the private aten kernel, which other torch builds may lack."""
    if not request.param:
        monkeypatch.setattr(cpu, "_flash_for_cpu", None)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("first", "kv_len"), [(0, size) for size in PROMPTS] + CHUNKS)
def test_every_size(first, kv_len, group):
    batch = 1 + (kv_len + group) % 3
    made = block_list(first, kv_len, 64, heads=2 * group, batch=batch)
    check(made, group)
    check(made.share_groups(group), group)


@pytest.mark.spanning
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("columns", ["none", "few", "all"])
@pytest.mark.parametrize(("first", "kv_len"), [(0, 513), (130, 513)])
def test_columns(first, kv_len, columns, batch, any_lse):
    blocks, mask = random_masks(first, kv_len, 64, batch=batch, heads=8)
    mask = {"none": torch.zeros_like(mask), "few": mask, "all": torch.ones_like(mask)}[columns]
    mask[0, 1] = columns == "all"  # one head of its own kind
    made = BlockList.from_mask(blocks, mask, block=64, first=first, kv_len=kv_len)
    check(made, 4)
    check(made.share_groups(4), 4)
    if columns != "none":
        qkv, bare = random_qkv(made, 4), rebuilt(made, blocks, None)
        assert (sparse(cpu, *qkv, made, 0.7) - sparse(cpu, *qkv, bare, 0.7)).abs().max() > 1e-4


@pytest.mark.spanning
@pytest.mark.parametrize("share", [0.0, 0.05, 0.9, 1.0])
@pytest.mark.parametrize(("first", "kv_len"), [(0, 400), (70, 400), (0, 20)])
def test_empty_sparse_and_full_lists(first, kv_len, share, any_lse):
    """Heads that list everything next to others; with nothing added, blocks that do not even list themselves."""
    blocks, columns = random_masks(first, kv_len, 64, heads=8, share=share)
    made = BlockList.from_mask(blocks, None, block=64, first=first, kv_len=kv_len)
    check(made, 4)
    blocks[:, 3] = True
    check(BlockList.from_mask(blocks, columns, block=64, first=first, kv_len=kv_len), 4)
    blocks[:, 1::2] &= torch.rand(blocks[:, 1::2].shape) < 0.5
    check(BlockList.from_mask(blocks, None, block=64, first=first, kv_len=kv_len), 4)
    nothing = torch.zeros_like(blocks)
    columns[:, 0] = False
    made = BlockList.from_mask(nothing, columns, block=64, first=first, kv_len=kv_len)
    qkv = random_qkv(made, 4)
    assert error(made, qkv) <= TOLERANCE
    assert (sparse(cpu, *qkv, made, 0.7)[:, 0] == 0).all()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1 << 13, 1 << 12, 2), (1 << 22, 1 << 22, 1 << 22)])
def test_any_bound_gives_the_same(sizes, monkeypatch):
    for name, size in zip(("TEMPORARY", "GATHERED", "COLUMN_BLOCKS"), sizes, strict=True):
        monkeypatch.setattr(_sparse_cpu, name, size)
    blocks, columns = random_masks(70, 720, 64, heads=8)
    blocks[:, 5] = True
    made = BlockList.from_mask(blocks, columns, block=64, first=70, kv_len=720)
    check(made, 4)
    check(made.share_groups(4), 4)


def test_other_blocks_and_layouts():
    for first, kv_len, block in [(0, 19, 4), (6, 19, 4), (5, 8, 4), (3, 4, 4)]:
        made = block_list(first, kv_len, block, heads=4)
        q, k, v = random_qkv(made, 2)
        assert error(made, (q, k, v)) <= TOLERANCE
        token_by_token = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
        assert error(made, (q.contiguous(), *token_by_token)) <= TOLERANCE


def test_nothing_that_is_not_listed_is_read():
    """Keys that no query of a KV head reads may be NaN."""
    blocks, columns = random_masks(0, 513, 64, heads=8, batch=1, share=0.2)
    blocks[:, :, :, 2] = blocks[:, :, :, 4] = False
    columns[..., 128:192] = columns[..., 256:320] = False
    made = BlockList.from_mask(blocks, columns, block=64, first=0, kv_len=513)
    q, k, v = random_qkv(made, 4)
    want = sparse(cpu, q, k, v, made, 0.7)
    rest = [i for i in range(513) if i // 64 not in (2, 4)]
    for lost in (k, v):
        lost[:, :, 256:320] = math.nan
    got = sparse(cpu, q, k, v, made, 0.7)
    assert torch.equal(got[:, :, rest], want[:, :, rest])
    k[:, :, 5] = math.nan
    assert not torch.equal(sparse(cpu, q, k, v, made, 0.7)[:, :, rest], want[:, :, rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [1, 4])
def test_low_precision_is_as_good_as_torch(dtype, group):
    made = block_list(70, 513, 64, heads=2 * group)
    q, k, v = random_qkv(made, group, dtype=dtype)
    exact = sparse(reference, q.double(), k.double(), v.double(), made, 0.25)
    mask = torch.zeros(made.visible().shape, dtype=dtype).masked_fill_(~made.visible(), -math.inf)
    torch_own = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25, enable_gqa=True)
    got = sparse(cpu, q, k, v, made, 0.25)
    assert got.dtype == dtype
    assert (got.double() - exact).abs().max() <= 2 * (torch_own.double() - exact).abs().max()
    assert not torch.equal(got.double(), exact), "a control: it rounds"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sparse(cpu, q, k, v, made, 0.25), got)


class Memory(TorchDispatchMode):
    """Numbers in the largest memory that was made inside, but for one of exactly ``out`` numbers; and host reads."""

    def __init__(self, out: int = 0):
        super().__init__()
        self.out, self.largest, self.reads = out, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.largest = max(self.largest, size if size != self.out else 0)
        return out


@pytest.mark.parametrize(("temporary", "columns"), [(1 << 13, True), (1 << 13, False), (1 << 15, True)])
def test_memory_is_bounded(temporary, columns, monkeypatch):
    """No temporary grows with the square of the prompt, nor with the heads."""
    for name in ("TEMPORARY", "GATHERED"):
        monkeypatch.setattr(_sparse_cpu, name, temporary)
    size, dim = 1500, 16
    blocks, mask = random_masks(0, size, 64, heads=8, batch=1)
    made = BlockList.from_mask(blocks, mask if columns else None, block=64, first=0, kv_len=size)
    qkv = random_qkv(made, 2, kv_heads=4, dim=dim, dtype=torch.float32)
    bound = max(temporary, size * dim)
    with Memory(out=qkv[0].numel()) as fast:
        sparse(cpu, *qkv, made, 0.7)
    assert temporary <= fast.largest <= bound
    with Memory() as slow:
        sparse(reference, *qkv, made, 0.7)
    assert slow.largest > bound, "a control: the mode sees what the definition makes"


def test_gradients_and_other_devices_are_refused():
    made = block_list(0, 130, 64, heads=2, batch=1)
    q, k, v = random_qkv(made, 1)
    for wants in (q, k, v):
        wants.requires_grad_()
        with pytest.raises(UnsupportedModeError, match="no gradient.*no_grad.*reference computes it"):
            sparse(cpu, q, k, v, made, 0.7)
        with torch.no_grad():
            assert error(made, (q, k, v)) <= TOLERANCE
        wants.requires_grad_(False)
    case = {"device": torch.device("cpu"), "dtype": torch.float32, "head_dim": 64, "needs_grad": False}
    assert dispatch.pick("cpu", dispatch.Case(**case, reads=BlockList)) is cpu
    assert dispatch.pick("auto", dispatch.Case(**{**case, "dtype": torch.float64}, reads=BlockList)) is cpu
    for change in ({"needs_grad": True}, {"device": torch.device("meta")}):
        other = {**case, **change}
        assert dispatch.pick("auto", dispatch.Case(**other, reads=BlockList)) is reference
        assert dispatch.pick("cpu", dispatch.Case(**other)) is cpu, "a control: other reads are computed there"
        with pytest.raises(UnsupportedModeError, match=r"cpu: .*block lists.*auto or one of: reference"):
            dispatch.pick("cpu", dispatch.Case(**other, reads=BlockList))
