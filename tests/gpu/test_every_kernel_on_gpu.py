"""Every kernel that computes on a GPU, there, against the slow definition: python -m pytest tests/gpu.

flash-attn must be installed (the `flash` extra), and Triton (the `dev` extra).
"""

from __future__ import annotations

import pytest
import torch
from helpers.calls import causal, decode, dense, sparse, streaming
from helpers.triton_cases import LOW, SCALE, check, cut, masks, random_qkv, wrong

from hf_longctx.errors import UnsupportedModeError
from hf_longctx.kernels import base as dispatch
from hf_longctx.kernels import reference
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.forward import Forward
from hf_longctx.layout.heads import RoleHeads
from hf_longctx.layout.reads import All, Causal, Window
from hf_longctx.layout.rows import Rows
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import HeadKV, Segment

DEVICE = torch.device("cuda")
WORDS = ("cpu", "flash", "flex", "reference", "triton")
SHAPE = (2, 2, 4, 64)  # B, n, G, D
every_kernel = pytest.mark.parametrize("word", WORDS)
both_dtypes = pytest.mark.parametrize("dtype", LOW, ids=str)


def kernel_for(word, dtype, reads=Causal):
    """The kernel of the word, or the one that runs in its place where it computes no such reads."""
    return dispatch.choose(word, dispatch.Case(DEVICE, dtype, SHAPE[3], reads=reads), Forward(Rows(1, 0, 1)))


def test_all_other_kernels_refuse_a_gpu():
    assert set(WORDS) <= set(dispatch.names())
    for word in set(dispatch.names()) - set(WORDS):
        with pytest.raises(UnsupportedModeError):
            kernel_for(word, torch.bfloat16)


@both_dtypes
@every_kernel
@pytest.mark.parametrize(("q_len", "kv_len"), [(700, 700), (200, 700), (1, 700)])
def test_dense_prefill(word, dtype, q_len, kv_len):
    q, k, v = random_qkv(SHAPE, q_len, kv_len, DEVICE, dtype)
    got = dense(kernel_for(word, dtype), q, k, v, SCALE)
    visible = reference.causal_visible(q_len, kv_len, DEVICE)
    check(got, q, k, v, visible)
    wrong(got, q, k, v.flip(1), visible)


@both_dtypes
@every_kernel
@pytest.mark.parametrize(("q_len", "total", "first"), [(700, 700, 16), (200, 700, 16), (130, 700, 400), (40, 50, 16)])
def test_streaming_prefill(word, dtype, q_len, total, first):
    q, k, v = random_qkv(SHAPE, q_len, total, DEVICE, dtype)
    parts = [t[:, :, piece] for piece in (slice(0, 16), slice(first, total)) for t in (k, v)]
    got = streaming(kernel_for(word, dtype, Window), q, *parts, recent=100, first=first, scale=SCALE)
    check(got, q, k, v, reference.streaming_visible(q_len, total, 16, 100, DEVICE))
    wrong(got, q, k, v, reference.streaming_visible(q_len, total, 8, 30, DEVICE))


@both_dtypes
@every_kernel
@pytest.mark.parametrize("cuts", [(), (64, 500)])
@pytest.mark.parametrize("q_len", [1, 30])
def test_segments(word, dtype, cuts, q_len):
    q, k, v = random_qkv(SHAPE, q_len, 700, DEVICE, dtype)
    segments, kernel = cut(k, v, cuts), kernel_for(word, dtype)
    got = causal(kernel, q, segments, SCALE)
    visible = reference.causal_visible(q_len, 700, DEVICE)
    check(got, q, k, v, visible)
    wrong(got, q, k, v.flip(1), visible)
    if q_len == 1:
        check(decode(kernel_for(word, dtype, All), q, segments, SCALE), q, k, v, None)


@both_dtypes
@every_kernel
def test_decode_of_rows_that_differ_in_length(word, dtype):
    q, k, v = random_qkv(SHAPE, 1, 300, DEVICE, dtype)
    length = torch.tensor([120, 300], device=DEVICE)
    bias = torch.randn(300, device=DEVICE)
    got = decode(kernel_for(word, dtype, All), q, [Segment(k, v, length, bias)], SCALE)
    visible = torch.arange(300, device=DEVICE) < length[:, None, None, None]
    check(got, q, k, v, visible, bias)
    wrong(got, q, k, v, None, bias)


@both_dtypes
@pytest.mark.parametrize("word", ["flex", "reference", "triton"])
@pytest.mark.parametrize(("first", "kv_len"), [(0, 700), (130, 513), (64, 65)])
@pytest.mark.parametrize("shared", [False, True], ids=["by head", "by group"])
def test_sparse_prefill(word, dtype, first, kv_len, shared):
    batch, kv_heads, group, _ = SHAPE
    made = BlockList.from_mask(
        *masks(first, kv_len, 64, batch, kv_heads * (1 if shared else group), DEVICE),
        block=64,
        first=first,
        kv_len=kv_len,
    )
    q, k, v = random_qkv(SHAPE, kv_len - first, kv_len, DEVICE, dtype)
    got = sparse(kernel_for(word, dtype, BlockList), q, k, v, made, SCALE)
    visible = made.visible().repeat_interleave(group if shared else 1, 1)
    check(got, q, k, v, visible)
    wrong(got, q, k, v, reference.causal_visible(kv_len - first, kv_len, DEVICE))


@both_dtypes
def test_attend_layer(dtype):
    batch, group, parts = 2, 4, []
    q = torch.randn(batch, 5 * group, 1, 64, device=DEVICE).to(dtype)
    kernel = kernel_for("triton", dtype, All)
    kept = {}
    for role, kv_heads, kv_len, cuts in (("retrieval", (0, 3), 7000, ()), ("streaming", (1, 2, 4), 320, (64,))):
        _, *kept[role] = random_qkv((batch, len(kv_heads), group, 64), 1, kv_len, DEVICE, dtype)
        parts.append(HeadKV(RoleHeads(role, kv_heads, 5), cut(*kept[role], cuts), None))
    given = [(part.heads.kv_heads, part.segments) for part in parts]
    got = kernel.attend_layer(q, given, Scores(SCALE))[0]
    for part in parts:
        mine = part.heads.take(got, group), part.heads.take(q, group)
        check(*mine, *kept[part.heads.role], None)
        wrong(mine[0].flip(1), mine[1], *kept[part.heads.role], None)
