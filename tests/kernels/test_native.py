"""The native kernel against the reference in float64.

The rule: its largest error in a tensor is at most twice that of torch's own attention (SDPA) in the same precision.
Both are judged on 512 queries or more: the largest of a few errors is chance, and two right kernels differ threefold.
"""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.block_lists import random_masks
from helpers.calls import causal, decode, dense, sparse, streaming
from helpers.native_builds import other_build  # noqa: F401 - a fixture
from torch.nn.functional import scaled_dot_product_attention

from hf_longctx.errors import UnsupportedModeError
from hf_longctx.kernels import _native_threads, cpu, native, reference
from hf_longctx.kernels import base as dispatch
from hf_longctx.kernels._native_threads import openmp_start
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.reads import ALL, CAUSAL, Window
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import Segment

# (B, n, G, D): every value of each next to several of the others.
SHAPES = [(2, 2, 4, 64), (3, 1, 7, 16), (1, 2, 8, 80), (3, 3, 1, 128), (1, 2, 4, 256), (2, 1, 4, 16)]
LENGTHS = [1, 2, 15, 24, 25, 63, 64, 65, 127, 129, 513]  # up to 24 queries are computed as in decode
DTYPES = [torch.float32, torch.bfloat16]
SINK, RECENT = 5, 40
SCALE = 0.3


@pytest.fixture(autouse=True)
def _on_and_compiled(monkeypatch):
    """These tests fail where there is no compiler, and the cpu kernel must not answer in place of this one."""
    monkeypatch.delenv(native.SWITCH, raising=False)
    assert native.supports(dispatch.Case(torch.device("cpu"), torch.float32, 64)) is None
    monkeypatch.setattr(cpu, "attend", None)


def random_tensor(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def random_qkv(shape, q_len, kv_len, dtype):
    """q as a projection gives it, k and v as views of longer buffers whose other slots are NaN."""
    batch, kv_heads, group, dim = shape
    q = random_tensor(batch, q_len, kv_heads * group, dim, dtype=dtype).transpose(1, 2)
    buffers = torch.full((2, batch, kv_heads, kv_len + 9, dim), math.nan, dtype=dtype)
    buffers[..., :kv_len, :] = random_tensor(2, batch, kv_heads, kv_len, dim, dtype=dtype)
    return q, *buffers[..., :kv_len, :]


def enough(shape, q_len):
    """The shape with as many rows as make 512 queries."""
    batch, kv_heads, group, dim = shape
    return max(batch, -(-512 // (kv_heads * group * q_len))), kv_heads, group, dim


def holds(got, q, k, v, visible, scale=SCALE, bias=None) -> bool:
    """Whether ``got [B, H, T, D]`` is by the rule the attention over what is ``visible``."""
    assert got.dtype == q.dtype
    assert got.shape == q.shape
    mask = torch.zeros(visible.shape).masked_fill_(~visible, -math.inf)[(None,) * (4 - visible.dim())]
    if bias is not None:
        mask, bias = mask + bias, bias.double()
    alone = []  # row by row: the reference holds every score, and a copy of the keys per query head, in float64
    for row in range(q.shape[0]):
        own = (x if x is None or x.dim() < 4 or x.shape[0] == 1 else x[row : row + 1] for x in (visible, bias))
        alone.append(
            reference.attention(*(x[row : row + 1].double() for x in (q, k, v)), next(own), scale, next(own))[0]
        )
    truth = torch.cat(alone)
    torch_own = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True).nan_to_num(0)
    error, allowed = ((x.double() - truth).abs().max() for x in (got, torch_own))
    return bool(error <= 2 * allowed)  # False for NaN; where torch only copies one key, the kernel must as well


def segments_of(k, v, cuts):
    bounds = list(zip([0, *cuts], [*cuts, k.shape[2]], strict=True))
    return [Segment(k[:, :, a:b], v[:, :, a:b], b - a) for a, b in bounds]


def check_dense(shape, q_len, past, dtype, cuts=()):
    q, k, v = random_qkv(enough(shape, q_len), q_len, q_len + past, dtype)
    visible = reference.causal_visible(q_len, q_len + past)
    got = causal(native, q, segments_of(k, v, cuts), SCALE)
    assert holds(got, q, k, v, visible)
    return got, (q, k, v), visible


def check_streaming(shape, q_len, past, dtype, sink=SINK, dropped=0):
    total = q_len + past
    q, k, v = random_qkv(enough(shape, q_len), q_len, total, dtype)
    first = min(sink, total) + dropped
    parts = (k[:, :, :sink], v[:, :, :sink], k[:, :, first:], v[:, :, first:])
    got = streaming(native, q, *parts, recent=RECENT, first=first, scale=SCALE)
    visible = reference.streaming_visible(q_len, total, sink, RECENT)
    assert holds(got, q, k, v, visible)
    return got, (q, k, v), visible


def check_sparse(shape, first, kv_len, dtype, block=64, share=0.4, columns=True, shared=False):
    batch, kv_heads, group, _ = shape = enough(shape, kv_len - first)
    q, k, v = random_qkv(shape, kv_len - first, kv_len, dtype)
    masks = random_masks(first, kv_len, block, batch=batch, heads=kv_heads if shared else kv_heads * group, share=share)
    made = BlockList.from_mask(masks[0], masks[1] if columns else None, block=block, first=first, kv_len=kv_len)
    visible = made.visible().repeat_interleave(group if shared else 1, 1)
    got = sparse(native, q, k, v, made, SCALE)
    assert holds(got, q, k, v, visible)
    return got, (q, k, v), visible


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("past", [0, 70])
@pytest.mark.parametrize("q_len", LENGTHS)
def test_every_length(q_len, past, dtype):
    shapes = [SHAPES[(q_len + past + i) % len(SHAPES)] for i in range(3)]
    check_dense(shapes[0], q_len, past, dtype)
    check_dense(shapes[0], q_len, past, dtype, cuts=(0, past // 2))
    dropped = max(0, past - (RECENT - 1) - SINK)  # a store keeps at least what the first query reads
    check_streaming(shapes[1], q_len, past, dtype, dropped=dropped)
    check_streaming(shapes[1], q_len, past, dtype, sink=0)
    check_sparse(shapes[2], past, q_len + past, dtype)
    check_sparse(shapes[2], past, q_len + past, dtype, shared=True)


def check_every_function(shape, dtype):
    check_dense(shape, 150, 20, dtype)
    check_streaming(shape, 200, 0, dtype)
    check_sparse(shape, 70, 300, dtype)
    check_decode(shape, 200, (), dtype)


@pytest.mark.spanning
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape, dtype):
    check_every_function(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("other_build")
def test_other_instruction_sets(dtype):
    for shape in SHAPES[:3]:
        check_every_function(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("block", "share", "columns"), [(4, 0.5, True), (128, 0.3, True), (64, 0, False), (100, 1, True)]
)
def test_lists_of_other_blocks(block, share, columns, dtype):
    check_sparse(SHAPES[0], 130, 513, dtype, block, share, columns)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_block_that_lists_nothing_gives_zeros(dtype):
    (q, k, v), (blocks, _) = random_qkv(SHAPES[0], 200, 200, dtype), random_masks(0, 200, 64, heads=8)
    blocks[:, 3, 2] = False
    made = BlockList.from_mask(blocks, block=64, first=0, kv_len=200)
    got = sparse(native, q, k, v, made, SCALE)
    assert (got[:, 3, 128:192] == 0).all()
    assert holds(got, q, k, v, made.visible())


def check_decode(shape, kv_len, cuts, dtype):
    q, k, v = random_qkv(enough(shape, 1), 1, kv_len, dtype)
    got = decode(native, q, segments_of(k, v, cuts), SCALE)
    visible = torch.ones(1, kv_len, dtype=torch.bool)
    assert holds(got, q, k, v, visible)
    return got, (q, k, v), visible


@pytest.mark.spanning
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kv_len", "cuts"), [(n, ()) for n in LENGTHS] + [(65, (64,)), (1500, (10, 700)), (90, (0, 9))]
)
def test_decode(kv_len, cuts, dtype):
    for shape in SHAPES:
        if kv_len <= 129 or shape[3] <= 64:  # 512 rows of long and wide keys would be gigabytes
            check_decode(shape, kv_len, cuts, dtype)


@pytest.mark.spanning
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_lengths_by_row_and_bias(shape, dtype):
    batch, kv_heads, group, dim = shape = enough(shape, 1)
    q, k, v = random_qkv(shape, 12, 50, dtype)
    length = torch.tensor([13, 50, 12] * batch)[:batch]
    for row, end in enumerate(length.tolist()):
        k[row, :, end:], v[row, :, end:] = math.nan, math.nan
    past = Segment(*(random_tensor(batch, kv_heads, 9, dim, dtype=dtype, seed=s) for s in (5, 6)), 9)
    keys, values = (torch.cat([a, b.nan_to_num(0)], 2) for a, b in ((past.k, k), (past.v, v)))
    slot = torch.arange(50) - length[:, None, None, None]

    def visible(queries, longer=0):
        own = slot < longer + 1 - queries + torch.arange(queries)[:, None]
        before = torch.ones(batch, 1, queries, 9, dtype=torch.bool)
        return torch.cat([before, own.expand(-1, -1, queries, -1)], 3)

    for queries in (12, 1):
        late = q[:, :, -queries:]
        got = causal(native, late, [past, Segment(k, v, length)], SCALE)
        assert holds(got, late, keys, values, visible(queries))
        assert not holds(got, late, keys, values, visible(queries, longer=-1))
    hiding = random_tensor(batch, 1, 1, 50, dtype=torch.float32)
    hiding[..., :3] = -math.inf
    for bias in (hiding, random_tensor(50), random_tensor(batch, kv_heads, 1, 50), random_tensor(1, 1, 1, 1)):
        added = torch.cat([torch.zeros(batch, kv_heads, 1, 9), bias.expand(batch, kv_heads, 1, 50)], 3).float()
        added = added.repeat_interleave(group, 1)
        got = decode(native, late, [past, Segment(k, v, length, bias)], SCALE)
        assert holds(got, late, keys, values, visible(1), bias=added)
        assert not holds(got, late, keys, values, visible(1), bias=added.roll(1, -1))
    nothing = decode(native, late, [Segment(k, v, torch.zeros(batch, dtype=torch.int64))], SCALE)
    assert (nothing == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("check", "q_len"),
    [(check_dense, 150), (check_streaming, 150), (check_sparse, 150), (check_dense, 9), (check_streaming, 9)],
)
def test_the_rule_fails_what_is_wrong(check, q_len, dtype):
    """A key too few, a key too many, a mask off by one, in one head or in all of them; and a wrong scale."""
    got, qkv, visible = check(SHAPES[0], q_len, 220, dtype)
    visible = visible.expand(*got.shape[:3], -1)
    off = torch.arange(visible.shape[3]) - torch.arange(visible.shape[3] - got.shape[2], visible.shape[3])[:, None]
    for heads in (slice(None), slice(3, 4)):
        for wrong, keys in ((False, off == -20), (False, off == 0), (True, off == 1), (True, off == 5)):
            other = visible.clone()
            other[:, heads] = other[:, heads].masked_fill(keys, wrong)
            assert not torch.equal(other, visible)
            assert not holds(got, *qkv, other)
        other = visible.clone()
        other[:, heads, :, 30] = False
        other[:, heads, :, 60] = True
        assert not holds(got, *qkv, other)
    assert not holds(got, *qkv, visible, scale=1.02 * SCALE)
    one = visible.clone()
    late = min(57, got.shape[2] - 1)
    one[1, 2, late] ^= off[late] == -3  # one key of one query of one head; in bfloat16 it may be too small to see
    assert dtype == torch.bfloat16 or not holds(got, *qkv, one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rule_fails_what_is_wrong_in_decode(dtype):
    got, (q, k, v), visible = check_decode(SHAPES[0], 200, (7,), dtype)
    for key in (0, 7, 199):
        other = visible.clone()
        other[0, key] = False
        assert not holds(got, q, k, v, other)
        few = decode(
            native, q, segments_of(*(torch.cat([x[:, :, :key], x[:, :, key + 1 :]], 2) for x in (k, v)), ()), SCALE
        )
        assert holds(few, q, k, v, other)
        assert not holds(few, q, k, v, visible), "a key too few; got is one too many of few"
    assert not holds(got, q, k, v, visible, scale=1.02 * SCALE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    """Tokens before heads, every second token, and a last dimension that is not dense."""
    q, k, v = (x.contiguous() for x in random_qkv(SHAPES[0], 200, 200, dtype))
    want = dense(native, q, k, v, SCALE)
    spread = [torch.stack([x, torch.full_like(x, math.nan)], 3).flatten(2, 3)[:, :, ::2] for x in (k, v)]
    for other in (
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        [q, *spread],
        [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)],
    ):
        assert not all(x.is_contiguous() for x in other)
        assert torch.equal(dense(native, *other, SCALE), want)
        assert torch.equal(
            decode(native, other[0][:, :, -1:], segments_of(*other[1:], ()), SCALE),
            decode(native, q[:, :, -1:], segments_of(k, v, ()), SCALE),
        )


@pytest.fixture
def used(monkeypatch):
    """How many threads each call took."""
    library, counts = native._load()[0], []

    def counted(function):
        return lambda *arguments: counts.append(function(*arguments)) or counts[-1]

    names = (f"hf_longctx_{name}" for name in ("decode", "dense", "streaming", "sparse"))
    counting = SimpleNamespace(**{name: counted(getattr(library, name)) for name in names})
    monkeypatch.setattr(native, "_load", lambda: (counting, None))
    yield counts
    torch.set_num_threads(1)


def answers(q, k, v):
    """What the four functions give for 300 queries over 4000 keys."""
    made = BlockList.from_mask(*random_masks(3700, 4000, 64, heads=8), block=64, first=3700, kv_len=4000)
    sinks, band = (k[:, :, :5], v[:, :, :5]), (k[:, :, 5:], v[:, :, 5:])
    return [
        dense(native, q, k, v, SCALE),
        streaming(native, q, *sinks, *band, recent=900, first=5, scale=SCALE),
        sparse(native, q, k, v, made, SCALE),
        decode(native, q[:, :, -1:], segments_of(k, v, (7,)), SCALE),
    ]


@pytest.fixture(params=[True, False], ids=["torch's threads", "own threads"])
def shared(request):
    """Whether the library takes torch's threads; where there are none to be found it has its own in both cases."""
    share = native._load()[0].hf_longctx_share_threads
    if not request.param:
        share(None)
    yield
    share(openmp_start())


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_answer_does_not_depend_on_the_threads(dtype, used):
    qkv = random_qkv((2, 2, 4, 128), 300, 4000, dtype)
    alone = answers(*qkv)
    assert used == [1] * 4
    for threads in (2, 3):
        torch.set_num_threads(threads)
        used.clear()
        assert all(torch.equal(a, b) for a, b in zip(alone, answers(*qkv), strict=True))
        assert used == [threads] * 4


@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="this torch computes without OpenMP")
def test_threads_are_those_of_torch():
    assert openmp_start() is not None, "the threads of two libraries would share the cores"
    q, k, v = random_qkv((1, 2, 4, 64), 300, 4000, torch.float32)
    want, asked = dense(native, q, k, v, SCALE), []

    @ctypes.CFUNCTYPE(None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def start(function, data, threads, flags):
        asked.append((threads, flags))
        function(data)

    share = native._load()[0].hf_longctx_share_threads
    torch.set_num_threads(2)
    try:
        share(start)
        assert torch.equal(dense(native, q, k, v, SCALE), want)
    finally:
        share(openmp_start())
        torch.set_num_threads(1)
    assert asked == [(2, 0)]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system does not say when a process began")
def test_a_forked_process_has_no_team(monkeypatch):
    assert not _native_threads.was_forked()
    child = os.fork()
    if not child:
        os._exit(0 if _native_threads.was_forked() and openmp_start() is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    monkeypatch.setattr(_native_threads, "STAT", Path("nowhere"))
    assert openmp_start() is None


def test_a_child_that_imports_this_after_torch_had_threads_computes():
    """torch's own operators would wait for the parent's threads there."""
    script = """
    import os, torch
    torch.set_num_threads(2)
    torch.randn(2000, 2000) @ torch.randn(2000, 2000)
    q = torch.ones(1, 4, 300, 64)
    if not (child := os.fork()):
        from hf_longctx.kernels import native
        from hf_longctx.layout.reads import CAUSAL
        from hf_longctx.layout.scores import Scores
        from hf_longctx.layout.segments import Segment
        out, _ = native.attend(q, [Segment(q, q, 300)], CAUSAL, Scores(0.1))
        os._exit(0 if (out[0, 0, -1] == 1).all() else 1)
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)


@pytest.mark.usefixtures("shared")
def test_little_work_takes_no_thread(used):
    torch.set_num_threads(3)
    q, k, v = random_qkv((1, 4, 4, 64), 5, 320, torch.float32)
    k, v = (x[:, :, :12] for x in (k, v))
    decode(native, q[:, :, -1:], segments_of(k, v, ()), SCALE)
    dense(native, q[:, :, :2], k, v, SCALE)
    assert used == [1, 1]


@pytest.mark.usefixtures("shared")
def test_many_python_threads_at_once():
    q, k, v = random_qkv((2, 2, 4, 64), 300, 4000, torch.float32)
    cases = [tuple(x.to(DTYPES[i % 2]) for x in (q * (1 + i / 8), k, v)) for i in range(8)]
    alone = [answers(*case) for case in cases]
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda case: answers(*case), cases))
    finally:
        torch.set_num_threads(1)
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(alone[0][0], alone[2][0])


def test_a_forked_child_computes_after_the_parent_did():
    q, k, v = random_qkv((2, 2, 4, 64), 1, 4000, torch.float32)
    torch.set_num_threads(2)
    try:
        want = decode(native, q, segments_of(k, v, ()), SCALE)
        child = os.fork()
        if not child:
            same = False
            try:
                same = torch.equal(decode(native, q, segments_of(k, v, ()), SCALE), want)
            finally:
                os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(1)


def test_a_nan_comes_through():
    for dtype in DTYPES:
        q, k, v = random_qkv(SHAPES[0], 100, 100, dtype)
        k[0, 0, 40] = math.nan
        out = dense(native, q, k, v, SCALE)
        assert out[0, :4, 40:].isnan().all()
        assert not out[0, :4, :40].isnan().any()
        assert not out[1].isnan().any()
        assert decode(native, q[:, :, :1], segments_of(k, v, ()), SCALE)[0, :4].isnan().all()


def test_what_it_supports():
    device = torch.device("cpu")
    for case, reason in (
        ((torch.device("cuda"), torch.float32, 64, False), "tensors on the CPU"),
        ((device, torch.float64, 64, False), "not torch.float64"),
        ((device, torch.float16, 64, False), "not torch.float16"),
        ((device, torch.float32, 72, False), "multiple of 16"),
        ((device, torch.float32, 272, False), "up to 256"),
        ((device, torch.bfloat16, 64, True), "no gradients"),
    ):
        assert reason in native.supports(dispatch.Case(*case))
    case = {"device": device, "dtype": torch.bfloat16, "head_dim": 80, "needs_grad": False}
    assert dispatch.pick("auto", dispatch.Case(**case)) is dispatch.pick("native", dispatch.Case(**case)) is native
    assert dispatch.pick("auto", dispatch.Case(**case, reads=BlockList)) is native


def test_a_list_of_other_sizes_is_refused():
    q, k, v = random_qkv(SHAPES[0], 129, 129, torch.float32)
    made = BlockList.from_mask(*random_masks(0, 130, 64, heads=8), block=64, first=0, kv_len=130)
    with pytest.raises(UnsupportedModeError, match="129 queries.*for 130 queries"):
        sparse(native, q, k, v, made, SCALE)


def test_what_it_does_not_compute_goes_to_the_other_kernels(monkeypatch):
    monkeypatch.undo()
    q, k, v = (x.contiguous() for x in random_qkv(SHAPES[5], 70, 70, torch.float32))
    made = BlockList.from_mask(*random_masks(0, 70, 64, heads=4), block=64, first=0, kv_len=70)
    bias = random_tensor(70, dtype=torch.float32)
    v.requires_grad_()  # as where only the value projection is trained
    for out in (
        dense(native, q, k, v, SCALE),
        decode(native, q[:, :, -1:], segments_of(k, v, ()), SCALE),
        streaming(native, q, k[:, :, :5], v[:, :, :5], k[:, :, 5:], v[:, :, 5:], recent=9, first=5, scale=SCALE),
        sparse(native, q, k, v, made, SCALE),
    ):
        assert torch.autograd.grad(out.sum(), v)[0].abs().sum() > 0
    k, v = k.detach(), v.detach()
    biased = causal(native, q, [Segment(k, v, 70, bias)], SCALE)
    assert torch.equal(biased, causal(cpu, q, [Segment(k, v, 70, bias)], SCALE))
    double = [x.double() for x in (q, k, v)]
    assert torch.equal(dense(native, *double, SCALE), dense(cpu, *double, SCALE))
    assert dense(native, q[:, :, :0], k, v, SCALE).shape[2] == 0
    assert (decode(native, q[:, :, :1], [Segment(k[:, :, :0], v[:, :, :0], 0)], SCALE) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_len", [1, 9, 70])
def test_logsumexp_softcap_and_the_first_bias_are_its_own(q_len, dtype):
    """The cpu kernel answers nothing here; in both loops, few queries and tiles of 64, all reads but a mean."""
    batch, kv_heads, group, dim = 2, 2, 4, 64
    q, k, v = random_qkv((batch, kv_heads, group, dim), q_len, 200, dtype)
    made = BlockList.from_mask(*random_masks(200 - q_len, 200, 64, heads=8), block=64, first=200 - q_len, kv_len=200)
    cut = segments_of(k, v, (3, 90))
    window = [Segment(k[:, :, :5], v[:, :, :5], 5), Segment(k[:, :, 5:], v[:, :, 5:], 195)]
    bias = random_tensor(8, dtype=torch.float32)
    for scores in (Scores(SCALE), Scores(SCALE, 2.0), Scores(SCALE, None, None, bias), Scores(SCALE, 2.0, None, bias)):
        for reads, segments in ((ALL, cut), (CAUSAL, cut), (Window(40, 5), window), (made, cut)):
            got, lse = native.attend(q, segments, reads, scores)
            exact = [Segment(one.k.double(), one.v.double(), one.length) for one in segments]
            want, want_lse = reference.attend(q.double(), exact, reads, scores)
            allowed = 2e-5 if dtype == torch.float32 else 0.02
            assert (got - want).abs().max() <= allowed
            nothing = want_lse == -math.inf
            assert torch.equal(lse == -math.inf, nothing) and lse.dtype == torch.float32
            assert (lse - want_lse).masked_fill(nothing, 0).abs().max() <= allowed
            other = replace(scores, softcap=1.5, first_bias=bias + 1)
            assert (lse - reference.attend(q.double(), exact, reads, other)[1]).nan_to_num(0).abs().max() > allowed


def test_tanh_of_the_softcap_over_its_range():
    """One key per query, of which the logsumexp is its score."""
    x = torch.cat([torch.linspace(-40, 40, 4001), torch.linspace(-1e-3, 1e-3, 95)])
    q = torch.zeros(1, 1, len(x), 16)
    q[0, 0, :, 0] = x
    k = torch.zeros(1, 1, 1, 16)
    k[..., 0] = 1
    for queries in (q, q[:, :, :20], q[:, :, -20:]):
        _, lse = native.attend(queries, [Segment(k, k, 1)], ALL, Scores(1.0, softcap=2.0))
        want = 2 * torch.tanh(queries[..., 0].double() / 2)
        assert (lse - want).abs().max() <= 5e-7
        assert ((lse - want).abs() <= 1e-6 * want.abs()).all()


def test_torch_s_threads_are_found_beside_files_with_any_name(monkeypatch, tmp_path):
    maps = tmp_path / "maps"
    maps.write_bytes(b"7f0-7f1 r--s 0 fe:00 7 /data/caf\xe9\n" + _native_threads.MAPS.read_bytes())
    monkeypatch.setattr(_native_threads, "MAPS", maps)
    assert openmp_start() is not None
    maps.unlink()
    maps.mkdir()  # what cannot be read
    assert openmp_start() is None
