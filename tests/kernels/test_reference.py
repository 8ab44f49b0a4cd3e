"""The reference kernel against explicit loops in Python: no other code of ours, no broadcasting to get wrong."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import calls
from helpers.calls import decode

from hf_longctx.kernels import reference
from hf_longctx.layout.segments import Segment

pytestmark = pytest.mark.quick


def loop_attention(q, k, v, sees, scale, bias=None):
    """out ``[B, H, T, D]`` and lse ``[B, H, T]`` by double loop; ``sees(i, j)`` of query index i and key index j."""
    batch, heads, q_len, dim = q.shape
    group = heads // k.shape[1]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(q_len):
                keys = [j for j in range(k.shape[2]) if sees(i, j)]
                scores = [scale * sum(float(q[b, h, i, d] * k[b, h // group, j, d]) for d in range(dim)) for j in keys]
                if bias is not None:
                    scores = [s + float(bias[b, h, i, j]) for s, j in zip(scores, keys, strict=True)]
                total = sum(math.exp(s) for s in scores)
                if not keys:
                    continue
                lse[b, h, i] = math.log(total)
                out[b, h, i] = sum(math.exp(s) / total * v[b, h // group, j] for s, j in zip(scores, keys, strict=True))
    return out, lse


def random_qkv(batch=2, heads=4, kv_heads=2, q_len=5, kv_len=7, dim=3, dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, dim))
    return [torch.randn(shape, generator=make, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("group", [1, 2, 4])
def test_attention_is_the_double_loop(group):
    q, k, v = random_qkv(kv_heads=4 // group)
    bias = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    visible = torch.rand(5, 7) < 0.6
    visible[2] = False
    out, lse = reference.attention(q, k, v, visible, 0.7, bias)
    want, want_lse = loop_attention(q, k, v, lambda i, j: bool(visible[i, j]), 0.7, bias)
    torch.testing.assert_close(out, want, atol=1e-13, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-13, rtol=0)
    assert (out[:, :, 2] == 0).all()
    assert (lse[:, :, 2] == -math.inf).all()


def test_visibility_rules():
    for q_len, kv_len in ((1, 1), (1, 9), (4, 9), (9, 9)):
        causal = reference.causal_visible(q_len, kv_len)
        streaming = reference.streaming_visible(q_len, kv_len, sink=2, recent=3)
        for t in range(q_len):
            i = kv_len - q_len + t
            for j in range(kv_len):
                assert bool(causal[t, j]) == (j <= i)
                assert bool(streaming[t, j]) == (j <= i and (j < 2 or i - j < 3))


@pytest.mark.parametrize(("sink", "first", "band", "q_len"), [(2, 2, 9, 11), (2, 5, 6, 3), (0, 0, 7, 7), (0, 4, 5, 2)])
def test_streaming_prefill_is_the_double_loop(sink, first, band, q_len):
    q, k, v = random_qkv(q_len=q_len, kv_len=sink + band)
    position = [*range(sink), *range(first, first + band)]

    def sees(t, slot):
        i, j = first + band - q_len + t, position[slot]
        return j <= i and (j < sink or i - j < 4)

    sinks, bands = [x[:, :, :sink] for x in (k, v)], [x[:, :, sink:] for x in (k, v)]
    out = calls.streaming(reference, q, *sinks, *bands, recent=4, first=first, scale=0.5)
    torch.testing.assert_close(out, loop_attention(q, k, v, sees, 0.5)[0], atol=1e-13, rtol=0)


def test_merge_joins_disjoint_keys_and_survives_rows_that_see_nothing():
    q, k, v = random_qkv(kv_len=9)
    visible = reference.causal_visible(5, 9)
    visible[1] = False
    parts = [
        reference.attention(q, k[:, :, c], v[:, :, c], visible[:, c], 1.0) for c in map(slice, (0, 2, 8), (2, 8, 9))
    ]
    out, lse = reference.merge(parts)
    want, want_lse = reference.attention(q, k, v, visible, 1.0)
    torch.testing.assert_close(out, want, atol=1e-13, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-13, rtol=0)
    assert not out.isnan().any()
    assert (lse[:, :, 1] == -math.inf).all()


def test_segments_are_the_double_loop_with_lengths_bias_and_nan():
    q, k, v = random_qkv(q_len=2, kv_len=9)
    length, bias = torch.tensor([2, 4]), torch.randn(2, 2, 1, 4, dtype=torch.float64)
    k[0, :, 7:] = v[0, :, 7:] = math.nan
    segments = [Segment(k[:, :, :5], v[:, :, :5], 5), Segment(k[:, :, 5:], v[:, :, 5:], length, bias)]
    full_bias = torch.cat([torch.zeros(2, 4, 2, 5), bias.repeat_interleave(2, 1).expand(-1, -1, 2, -1)], 3)
    out = calls.causal(reference, q, segments, 0.6)
    for b in range(2):
        sees = lambda t, j, b=b: j < 5 or j - 5 <= int(length[b]) - 2 + t  # noqa: E731
        row = [x[b : b + 1] for x in (q, k, v)]
        want = loop_attention(*row, sees, 0.6, full_bias[b : b + 1])[0]
        torch.testing.assert_close(out[b : b + 1], want, atol=1e-13, rtol=0)
    last = decode(reference, q[:, :, 1:], segments, 0.6)
    torch.testing.assert_close(last, out[:, :, 1:], atol=1e-13, rtol=0)


def test_low_precision_is_computed_in_float32():
    q, k, v = random_qkv(dtype=torch.bfloat16)
    out, lse = reference.attention(q, k, v, None, 1.0)
    want = reference.attention(q.double(), k.double(), v.double(), None, 1.0)[0]
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, want.to(torch.bfloat16), atol=1e-2, rtol=1e-2)


def test_gradients_are_right_and_finite_where_nothing_is_seen():
    q, k, v = (x.requires_grad_() for x in random_qkv(batch=1, q_len=3, kv_len=4))
    visible = reference.causal_visible(3, 4)
    visible[1] = False

    def both(q, k, v):
        halves = [reference.attention(q, k[:, :, c], v[:, :, c], visible[:, c], 1.0) for c in (slice(2), slice(2, 4))]
        return reference.merge(halves)[0]

    assert torch.autograd.gradcheck(both, (q, k, v))
