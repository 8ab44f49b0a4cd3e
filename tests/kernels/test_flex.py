"""The flex kernel against the slow definition in float64, and what it compiles: every list and length by one kernel."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.block_lists import block_list, random_masks, random_qkv, rebuilt, toggled
from helpers.calls import sparse
from torch.nn.functional import scaled_dot_product_attention

from hf_longctx.errors import UnsupportedModeError
from hf_longctx.kernels import base as dispatch
from hf_longctx.kernels import cpu, flex, reference
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.forward import Forward
from hf_longctx.layout.reads import CAUSAL, Causal
from hf_longctx.layout.rows import Rows
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import Segment

GROUP, SCALE = 2, 0.25
CASE = {"device": torch.device("cpu"), "dtype": torch.float32, "head_dim": 16, "reads": BlockList}


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def check(made: BlockList, dtype=torch.float32) -> None:
    """At most twice torch's own error, and far from what a list gives that differs in one block."""
    q, k, v = random_qkv(made, GROUP, dtype=dtype)
    exact = sparse(reference, q.double(), k.double(), v.double(), made, SCALE)
    visible = made.visible().repeat_interleave(q.shape[1] // made.counts.shape[1], 1)
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -math.inf)
    torch_own = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True)
    torch_own = torch_own.masked_fill(~visible.any(-1, keepdim=True), 0)
    got = sparse(flex, q, k, v, made, SCALE)
    assert (got.dtype, got.shape) == (dtype, q.shape)
    allowed = max(2 * (torch_own.double() - exact).abs().max(), torch.finfo(dtype).eps)
    assert (got.double() - exact).abs().max() <= allowed
    other = sparse(reference, q.double(), k.double(), v.double(), toggled(made), SCALE)
    assert (got.double() - other).abs().max() > 100 * allowed or dtype != torch.float32
    assert (got.double() - other).abs().max() > 2 * allowed


def test_every_size_and_list_by_one_compiled_kernel():
    check(block_list(70, 513, 64, heads=2 * GROUP))
    compiled = graphs()
    assert compiled >= 1, "a control: the counter counts"
    for first, kv_len in [(0, 1), (0, 63), (0, 65), (0, 128), (1, 130), (63, 64), (128, 192), (130, 513), (0, 700)]:
        made = block_list(first, kv_len, 64, heads=2 * GROUP)
        check(made)
        check(made.share_groups(GROUP))
    for share in (0.0, 0.1, 0.9, 1.0):
        blocks, columns = random_masks(70, 400, 64, heads=2 * GROUP, share=share)
        blocks[:, 1::2] &= torch.rand(blocks[:, 1::2].shape) < 0.5  # blocks that do not list themselves
        for mask in (None, columns, torch.ones_like(columns)):
            made = BlockList.from_mask(blocks, mask, block=64, first=70, kv_len=400)
            check(made)
            check(made.share_groups(GROUP))
    assert graphs() == compiled


def test_columns_are_read_and_a_query_that_reads_nothing_gives_zero():
    blocks, columns = random_masks(0, 400, 64, heads=2 * GROUP)
    nothing = torch.zeros_like(blocks)
    columns[:, 0] = False
    made = BlockList.from_mask(nothing, columns, block=64, first=0, kv_len=400)
    q, k, v = random_qkv(made, GROUP, dtype=torch.float32)
    got = sparse(flex, q, k, v, made, SCALE)
    assert (got - sparse(reference, q, k, v, made, SCALE)).abs().max() < 1e-5
    assert (got[:, 0] == 0).all()
    assert (got[:, 1:, 128:] != 0).all()
    bare = rebuilt(made, nothing, None)
    assert (sparse(flex, q, k, v, bare, SCALE) == 0).all()


def test_low_precision_and_autocast():
    made = block_list(70, 400, 64, heads=2 * GROUP)
    before = graphs()
    check(made, torch.bfloat16)
    compiled = graphs()
    assert compiled == before + 1, "a control: another dtype is compiled anew"
    qkv = random_qkv(made, GROUP, dtype=torch.float32)
    want = sparse(flex, *qkv, made, SCALE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sparse(flex, *qkv, made, SCALE), want)
    assert graphs() <= compiled + 1, "float32 may run here first"


def test_auto_never_takes_it():
    assert dispatch.pick("flex", dispatch.Case(**CASE)) is flex
    chosen = [
        dispatch.pick("auto", dispatch.Case(**CASE)),
        dispatch.pick("auto", dispatch.Case(**CASE)),
    ]
    assert flex not in chosen
    assert flex.PREFERENCE < reference.PREFERENCE < cpu.PREFERENCE
    with pytest.raises(UnsupportedModeError, match="flex: computes no Causal"):
        dispatch.pick("flex", dispatch.Case(**{**CASE, "reads": Causal}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("meta")}, "CPU and for CUDA, not for meta"),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"head_dim": 80}, "power of two from 16 on, not 80"),
        ({"head_dim": 8}, "power of two from 16 on, not 8"),
        ({"needs_grad": True}, "no gradients"),
    ],
)
def test_what_it_does_not_compute(change, reason):
    assert flex.supports(dispatch.Case(**CASE)) is None
    assert reason in flex.supports(dispatch.Case(**{**CASE, **change}))
    with pytest.raises(UnsupportedModeError, match="auto or one of: .*reference"):
        dispatch.pick("flex", dispatch.Case(**{**CASE, **change}))


def test_on_a_gpu_it_needs_triton_and_auto_takes_what_needs_no_compiler(monkeypatch):
    case = {**CASE, "device": torch.device("cuda")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA device, and there is none" in flex.supports(dispatch.Case(**case))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "needs compute capability (8, 0)" in flex.supports(dispatch.Case(**case))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert flex.supports(dispatch.Case(**case)) is None
    assert dispatch.pick("auto", dispatch.Case(**case)) is reference


def test_without_a_compiler_it_says_so(monkeypatch):
    made = block_list(0, 130, 64, heads=2, batch=1)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnsupportedModeError, match=r"C\+\+ compiler, and no-such-compiler.*cpu or reference"):
        sparse(flex, *random_qkv(made, 1, dtype=torch.float32), made, SCALE)


def test_a_gradient_is_refused():
    made = block_list(0, 130, 64, heads=2, batch=1)
    q, k, v = random_qkv(made, 1, dtype=torch.float32)
    with pytest.raises(UnsupportedModeError, match="no gradients"):
        sparse(flex, q.requires_grad_(), k, v, made, SCALE)


def test_reads_that_are_no_list_are_refused_in_words():
    q = torch.randn(1, 2, 3, 16)
    segment = Segment(q, q, 3)
    with pytest.raises(UnsupportedModeError, match="flex was given Causal to read and computes BlockList"):
        flex.attend(q, [segment], CAUSAL, Scores(SCALE))
    got, _ = dispatch.attend("flex", q, [segment], CAUSAL, Scores(SCALE), Forward(Rows(1, 0, 3)))
    want, _ = reference.attend(q, [segment], CAUSAL, Scores(SCALE))
    assert (got - want).abs().max() < 1e-5, "the dispatcher takes another kernel"
