"""The SDPA kernels against the reference in float64, and the bounds on masks and memory that make them usable."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import calls
from helpers.calls import decode, dense, streaming

from hf_longctx.kernels import cpu, reference
from hf_longctx.layout.reads import ALL
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import Segment

TOLERANCE = 1e-12
BLOCK = 64
SINK, RECENT = 5, 40
EDGE = SINK + RECENT
# (B, n, G, D): every value of each next to several of the others, not the full product.
SHAPES = [(1, 1, 1, 16), (1, 2, 4, 64), (3, 1, 7, 16), (3, 2, 8, 16), (1, 3, 1, 64), (3, 1, 4, 16)]


def random_tensor(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def random_qkv(shape, q_len, kv_len, dtype=torch.float64):
    batch, kv_heads, group, dim = shape
    q = random_tensor(batch, kv_heads * group, q_len, dim, dtype=dtype)
    return q, *(random_tensor(batch, kv_heads, kv_len, dim, dtype=dtype, seed=s) for s in (1, 2))


def in_nan_buffer(x, extra=37):
    """The same numbers as a view of a longer buffer whose other slots are NaN."""
    buffer = torch.full((*x.shape[:2], x.shape[2] + extra, x.shape[3]), math.nan, dtype=x.dtype)
    buffer[:, :, : x.shape[2]] = x
    return buffer[:, :, : x.shape[2]]


def error(a, b):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return float((a - b).detach().abs().max()) if a.numel() else 0.0


@pytest.fixture
def masks(monkeypatch):
    """(entries of the mask, keys) of every masked SDPA call of the kernel."""
    seen, real, flash = [], cpu.scaled_dot_product_attention, cpu._flash_for_cpu

    def spy(q, k, v, attn_mask=None, **rest):
        seen.append((0 if attn_mask is None else attn_mask.numel(), k.shape[2]))
        return real(q, k, v, attn_mask=attn_mask, **rest)

    def flash_spy(q, k, v, *rest, attn_mask=None, **named):
        seen.append((0 if attn_mask is None else attn_mask.numel(), k.shape[2]))
        return flash(q, k, v, *rest, attn_mask=attn_mask, **named)

    monkeypatch.setattr(cpu, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(cpu, "_flash_for_cpu", flash_spy)
    return seen


@pytest.fixture(params=[True, False], ids=["flash_lse", "attend"])
def any_lse(request, monkeypatch):
    """Run with and without the private aten kernel: the second is what CUDA and other torch builds get."""
    if not request.param:
        monkeypatch.setattr(cpu, "_flash_for_cpu", None)
    return request.param


LENGTHS = [1, 63, 64, 65, 257]


@pytest.mark.parametrize(("q_len", "past"), [(n, p) for n in LENGTHS for p in (0, 1, 130)] + [(600, 0), (600, 70)])
def test_dense_prefill(q_len, past, any_lse):
    shape = SHAPES[(q_len + past) % len(SHAPES)]
    q, k, v = random_qkv(shape, q_len, q_len + past)
    got = dense(cpu, q, in_nan_buffer(k), in_nan_buffer(v), 0.3)
    assert error(got, dense(reference, q, k, v, 0.3)) <= TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_prefill_of_every_shape(shape, any_lse):
    q, k, v = random_qkv(shape, 70, 95)
    assert error(dense(cpu, q, k, v, 0.3), dense(reference, q, k, v, 0.3)) <= TOLERANCE
    shifted = dense(cpu, q, k.roll(1, 2), v.roll(1, 2), 0.3)
    assert error(shifted, dense(reference, q, k, v, 0.3)) > 1e-3


def check_streaming(shape, q_len, total, sink, recent, dropped=0):
    """Rows of ``total`` tokens of which the last ``q_len`` are queries and ``dropped`` after the sinks are gone."""
    q, k, v = random_qkv(shape, q_len, total)
    first = min(sink, total) + dropped
    parts = [in_nan_buffer(x) for x in (k[:, :, :sink], v[:, :, :sink], k[:, :, first:], v[:, :, first:])]
    got = streaming(cpu, q, *parts, recent=recent, first=first, scale=0.3)
    visible = reference.streaming_visible(q_len, total, sink, recent)
    want = reference.attention(q, k, v, visible, 0.3)[0]
    assert error(got, want) <= TOLERANCE
    assert error(streaming(reference, q, *parts[:2], *parts[2:], recent=recent, first=first, scale=0.3), want) <= (
        TOLERANCE
    )
    return q, parts, first, want


@pytest.mark.parametrize(
    "q_len", [1, 3, SINK, EDGE, EDGE + 1, 63, 64, 65, EDGE + 63, EDGE + 64, EDGE + 65, 257, 10 * EDGE]
)
def test_streaming_prefill_of_a_whole_prompt(q_len):
    for sink, shape in ((SINK, SHAPES[q_len % 6]), (0, SHAPES[(q_len + 3) % 6])):
        check_streaming(shape, q_len, q_len, sink, RECENT)


@pytest.mark.parametrize("q_len", [1, 2, 16, 63, 64, 65, 128, 257])
@pytest.mark.parametrize("past", [1, SINK, RECENT - 1, EDGE, 200])
def test_streaming_prefill_after_a_past(q_len, past):
    total = q_len + past
    for sink in (SINK, 0):
        # A store keeps the sinks and at least the recent - 1 tokens that the first query reads; here, just these.
        dropped = max(0, past - (RECENT - 1) - sink)
        check_streaming(SHAPES[(q_len + past) % 6], q_len, total, sink, RECENT, dropped)
        check_streaming(SHAPES[(q_len + past + 1) % 6], q_len, total, sink, RECENT, dropped // 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_streaming_prefill_of_every_shape(shape):
    check_streaming(shape, 300, 300, SINK, RECENT)
    check_streaming(shape, 150, 250, SINK, 1)


def test_streaming_window_off_by_one_fails():
    q, parts, first, want = check_streaming((1, 2, 4, 16), 300, 300, SINK, RECENT)
    for recent in (RECENT - 1, RECENT + 1):
        got = streaming(cpu, q, *parts, recent=recent, first=first, scale=0.3)
        assert error(got, want) > 1e-3
    unlike = reference.attention(q, *random_qkv((1, 2, 4, 16), 300, 300)[1:], reference.causal_visible(300, 300), 0.3)[
        0
    ]
    assert error(unlike, want) > 1e-3


def test_streaming_groups_of_blocks_do_not_change_the_answer(monkeypatch):
    monkeypatch.setattr(cpu, "TEMPORARY", 1)
    check_streaming((3, 2, 4, 16), 300, 300, SINK, RECENT)


def segments_of(k, v, cuts, lengths=None):
    """Segments of consecutive keys in NaN buffers."""
    bounds = list(zip([0, *cuts], [*cuts, k.shape[2]], strict=True))
    return [Segment(in_nan_buffer(k[:, :, a:b]), in_nan_buffer(v[:, :, a:b]), b - a) for a, b in bounds]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("kv_len", "cuts"), [(1, ()), (63, ()), (257, ()), (65, (64,)), (257, (10, 200)), (90, (0, 40))]
)
def test_decode(shape, kv_len, cuts, any_lse):
    q, k, v = random_qkv(shape, 1, kv_len)
    got = decode(cpu, q, segments_of(k, v, cuts), 0.3)
    assert error(got, reference.attention(q, k, v, None, 0.3)[0]) <= TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_with_bias_and_lengths_per_row(shape, any_lse):
    batch, heads, _, _ = shape
    q, k, v = random_qkv(shape, 1, 50)
    length = torch.tensor([13, 50, 0][:batch])
    past = (torch.arange(50) >= length[:, None])[:, None, :, None]
    k, v = k.masked_fill(past, math.nan), v.masked_fill(past, math.nan)
    plain = Segment(*(random_tensor(batch, heads, 9, shape[3], seed=s) for s in (5, 6)), 9)
    for bias in (None, random_tensor(50), random_tensor(batch, heads, 1, 50), random_tensor(1, 1, 1, 1)):
        ragged = Segment(k, v, length, bias)
        for segments in ([ragged], [plain, ragged], [ragged, plain], [ragged, ragged]):
            want = decode(reference, q, segments, 0.3)
            assert not want.isnan().any()
            assert error(decode(cpu, q, segments, 0.3), want) <= TOLERANCE
    unbiased = decode(cpu, q, [Segment(k, v, length)], 0.3)
    assert error(unbiased, decode(cpu, q, [Segment(k, v, length, random_tensor(50))], 0.3)) > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("q_len", "cuts"), [(2, ()), (16, (30,)), (65, (10, 20)), (65, (0, 35)), (1, (50,))])
def test_dense_prefill_segments(shape, q_len, cuts, any_lse):
    q, k, v = random_qkv(shape, q_len, 100)
    got = calls.causal(cpu, q, segments_of(k, v, cuts), 0.3)
    assert error(got, dense(reference, q, k, v, 0.3)) <= TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_prefill_segments_with_bias_and_lengths_per_row(shape, any_lse):
    batch, heads, _, _ = shape
    q, k, v = random_qkv(shape, 12, 50)
    length, short = torch.tensor([13, 50, 12][:batch]), torch.tensor([0, 3, 9][:batch])
    for bias in (None, random_tensor(batch, heads, 1, 50)):
        segments = [Segment(k[:, :, :9], v[:, :, :9], short), Segment(k, v, length, bias)]
        for used in (segments, segments[1:], [segments[1], Segment(k, v, 50, bias)]):
            want = calls.causal(reference, q, used, 0.3)
            assert error(calls.causal(cpu, q, used, 0.3), want) <= TOLERANCE


@pytest.mark.parametrize("causal", [False, True])
def test_attend_in_small_tiles(causal, monkeypatch):
    monkeypatch.setattr(cpu, "TEMPORARY", 900)
    monkeypatch.setattr(cpu, "TILE_KEYS", 16)
    q, k, v = random_qkv((2, 2, 3, 16), 37, 70)
    bias = random_tensor(2, 2, 1, 70)
    bias[..., :33] = -math.inf
    out, lse = cpu._tiled(q, k, v, Scores(0.3), bias, causal)
    visible = reference.causal_visible(37, 70) if causal else None
    want, want_lse = reference.attention(q, k, v, visible, 0.3, bias.repeat_interleave(3, 1))
    assert error(out, want) <= TOLERANCE
    assert error(lse, want_lse) <= TOLERANCE


def test_nothing_to_do_gives_empty_or_zero():
    q, k, v = random_qkv((1, 2, 4, 16), 3, 8)
    none = k[:, :, :0]
    for run in (
        lambda q, k, v: dense(cpu, q, k, v, 0.3),
        lambda q, k, v: streaming(cpu, q, k[:, :, :0], v[:, :, :0], k, v, recent=4, first=0, scale=0.3),
        lambda q, k, v: calls.causal(cpu, q, segments_of(k, v, (2,)), 0.3),
        lambda q, k, v: decode(cpu, q[:, :, :1], segments_of(k, v, ()), 0.3),
    ):
        assert run(q[:, :, :0], k, v).shape[2] == 0
        assert run(q[:, :0], k[:, :0], v[:, :0]).shape[1] == 0
    assert (decode(cpu, q[:, :, :1], [Segment(none, none, 0)], 0.3) == 0).all()
    out, lse = cpu.attend(q, [Segment(none, none, 0)], ALL, Scores(0.3))
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def low_precision_cases(q, k, v, dtype):
    """(kernel output, plain torch output in the same precision, float64 truth)."""
    total, truth_of = q.shape[2], [x.double() for x in (q, k, v)]
    for visible, run in (
        (reference.causal_visible(total, total), lambda: dense(cpu, q, k, v, 0.25)),
        (
            reference.streaming_visible(total, total, SINK, RECENT),
            lambda: streaming(
                cpu,
                q,
                *(x[:, :, a] for a in (slice(SINK), slice(SINK, None)) for x in (k, v)),
                recent=RECENT,
                first=SINK,
                scale=0.25,
            ),
        ),
        (reference.causal_visible(100, total), lambda: dense(cpu, q[:, :, -100:], k, v, 0.25)),
        (
            reference.causal_visible(100, total),
            lambda: calls.causal(cpu, q[:, :, -100:], segments_of(k, v, (99, 200)), 0.25),
        ),
        (reference.causal_visible(1, total), lambda: decode(cpu, q[:, :, -1:], segments_of(k, v, ()), 0.25)),
        (reference.causal_visible(1, total), lambda: decode(cpu, q[:, :, -1:], segments_of(k, v, (7, 100)), 0.25)),
    ):
        rows = q[:, :, -visible.shape[0] :]
        wide = [x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)]
        scores = (rows @ wide[0].transpose(-1, -2) * 0.25).masked_fill(~visible, -math.inf)
        plain = scores.softmax(-1, dtype=torch.float32).to(dtype) @ wide[1]
        truth = reference.attention(truth_of[0][:, :, -visible.shape[0] :], *truth_of[1:], visible, 0.25)[0]
        yield run(), plain, truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_at_most_twice_as_wrong_as_plain_torch(dtype, any_lse):
    q, k, v = random_qkv((2, 2, 4, 16), 300, 300, dtype)
    for got, plain, truth in low_precision_cases(q, k, v, dtype):
        assert got.dtype == dtype
        assert float((got.double() - truth).abs().max()) <= 2 * float((plain.double() - truth).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_is_not_rounded_to_half_precision(dtype, any_lse):
    q, k, v = random_qkv((1, 2, 4, 16), 1, 40, dtype)
    bias = torch.linspace(8, 10, 40)
    for length in (40, torch.tensor([40])):
        got = decode(cpu, q, [Segment(k, v, length, bias)], 0.25)
        truth = reference.attention(q.double(), k.double(), v.double(), None, 0.25, bias.double())[0]
        rounded = reference.attention(q.double(), k.double(), v.double(), None, 0.25, bias.to(dtype).double())[0]
        assert float((got.double() - truth).abs().max()) < 0.5 * float((rounded - truth).abs().max()) + 2e-3


@pytest.mark.parametrize("group", [1, 4])
def test_gradients(group):
    q, k, v = (x.requires_grad_() for x in random_qkv((1, 1, group, 4), 9, 9))
    late = q[:, :, 4:].detach().requires_grad_()
    one = q[:, :, :1].detach().requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda q, k, v: dense(cpu, q, k, v, 0.5), (q, k, v))
    assert check(lambda q, k, v: dense(cpu, q, k, v, 0.5), (late, k, v))
    assert check(
        lambda q, k, v: streaming(
            cpu, q, k[:, :, :2], v[:, :, :2], k[:, :, 2:], v[:, :, 2:], recent=3, first=2, scale=0.5
        ),
        (q, k, v),
    )
    assert check(lambda q, k, v: decode(cpu, q, [Segment(k, v, torch.tensor([6]))], 0.5), (one, k, v))

    def two(q, k, v):
        return calls.causal(cpu, q, [Segment(k[:, :, :3], v[:, :, :3], 3), Segment(k[:, :, 3:], v[:, :, 3:], 6)], 0.5)

    assert check(two, (late, k, v))
    assert check(two, (one, k, v))


def test_streaming_gradients_through_uniform_blocks():
    q, k, v = random_qkv((2, 1, 2, 4), 200, 200)
    parts = [x.clone().requires_grad_() for x in (q, k[:, :, :3], v[:, :, :3], k[:, :, 3:], v[:, :, 3:])]
    weight = random_tensor(2, 2, 200, 4, seed=9)
    grads = [
        torch.autograd.grad((streaming(kernel, *parts, recent=20, first=3, scale=0.5) * weight).sum(), parts)
        for kernel in (cpu, reference)
    ]
    assert max(error(a, b) for a, b in zip(*grads, strict=True)) <= 1e-11


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_strides_and_a_backward_pass(dtype):
    """Transformers hands q, k and v over as transposed views ``[B, T, H, D]``."""
    shape = (3, 2, 4, 16)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv(shape, 150, 150, dtype)]
    tolerance = TOLERANCE if dtype == torch.float64 else 2e-2
    for grad in (False, True):
        q, k, v = (x.detach().requires_grad_(grad) for x in strided)
        streamed = [q, k[:, :, :5], v[:, :, :5], k[:, :, 5:], v[:, :, 5:]]
        segments = [Segment(k[:, :, :70], v[:, :, :70], 70), Segment(k[:, :, 70:], v[:, :, 70:], 80)]
        for run in (
            lambda kernel, s=streamed: streaming(kernel, *s, recent=40, first=5, scale=0.3),
            lambda kernel, q=q, k=k, v=v: dense(kernel, q[:, :, 50:], k, v, 0.3),
            lambda kernel, q=q, s=segments: calls.causal(kernel, q[:, :, 90:], s, 0.3),
            lambda kernel, q=q, s=segments: decode(kernel, q[:, :, 149:], s, 0.3),
        ):
            got = run(cpu)
            assert error(got, run(reference)) <= tolerance
            if grad:
                got.float().sum().backward()
                assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("grad", [False, True])
def test_masks_stay_small(group, grad, masks):
    q, k, v = (x.requires_grad_(grad) for x in random_qkv((1, 1, group, 16), 1100, 1400, torch.float32))
    dense(cpu, q, k, v, 0.25)
    dense(cpu, q, k[:, :, :1100], v[:, :, :1100], 0.25)
    streamed = (q, k[:, :, :5], v[:, :, :5], k[:, :, 5:1100], v[:, :, 5:1100])
    streaming(cpu, *streamed, recent=40, first=5, scale=0.25)
    segments = [Segment(k[:, :, :200], v[:, :, :200], 200), Segment(k[:, :, 200:], v[:, :, 200:], 1200)]
    calls.causal(cpu, q, segments, 0.25)
    decode(cpu, q[:, :, :1], segments[:1], 0.25)
    assert masks
    assert all(entries <= 512 * keys for entries, keys in masks)
    assert masks[-1][0] == 0  # plain decode needs none


def test_streaming_prefill_reads_a_number_of_keys_linear_in_the_prompt(masks):
    def keys_read(q_len):
        masks.clear()
        q, k, v = random_qkv((1, 1, 4, 16), q_len, q_len, torch.float32)
        streaming(cpu, q, k[:, :, :5], v[:, :, :5], k[:, :, 5:], v[:, :, 5:], recent=40, first=5, scale=0.25)
        return len(masks), max(keys for _, keys in masks)

    assert keys_read(1000)[1] == keys_read(4000)[1] <= 5 + 40 + BLOCK
    # A verification step with a past costs one call over what its queries see.
    q, k, v = random_qkv((1, 1, 4, 16), 3, 500, torch.float32)
    masks.clear()
    streaming(cpu, q, k[:, :, :5], v[:, :, :5], k[:, :, 5:], v[:, :, 5:], recent=40, first=5, scale=0.25)
    assert [keys for _, keys in masks] == [5 + 40 + 2]
