"""The cases of the Triton kernels, for any device: run by the interpreter in a process of its own, and on a GPU.

Run as a script, with TRITON_INTERPRET=1, it prints as JSON the failure of every case, or null.
"""

from __future__ import annotations

import json
import math
import sys
import traceback

import pytest
import torch

from helpers import calls
from helpers.calls import causal
from helpers.packed_cases import cases as packed_cases
from helpers.packed_cases import packed, random_numbers, truth
from helpers.triton_models import benchmark, forks, one_launch_per_layer
from hf_longctx.kernels import reference, triton
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.heads import RoleHeads
from hf_longctx.layout.reads import ALL, Window
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import HeadKV, Segment

SCALE = 0.3
TOLERANCE = 1e-5  # float32
PACKED = 7  # cases of packed keys
LOW = (torch.bfloat16, torch.float16)


def random_tensor(*shape, device, dtype, seed=0):
    make = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=make).to(device, dtype)


def random_qkv(shape, q_len, kv_len, device, dtype):
    """q as Transformers hands it, a transposed view; k, v as a store does, a view of a longer buffer full of NaN."""
    batch, kv_heads, group, dim = shape
    q = random_tensor(batch, q_len, kv_heads * group, dim, device=device, dtype=dtype).transpose(1, 2)
    k, v = (random_tensor(batch, kv_heads, kv_len, dim, device=device, dtype=dtype, seed=s) for s in (1, 2))
    return q, in_nan_buffer(k), in_nan_buffer(v)


def in_nan_buffer(x, extra=37):
    buffer = torch.full((*x.shape[:2], x.shape[2] + extra, x.shape[3]), math.nan, dtype=x.dtype, device=x.device)
    buffer[:, :, : x.shape[2]] = x
    return buffer[:, :, : x.shape[2]]


def error_of(got, want) -> float:
    assert got.shape == want.shape
    return float((got.double() - want.double()).abs().max())


def check(got, q, k, v, visible, bias=None):
    """Against attention in float64; in low precision at most twice as wrong as plain torch is."""
    assert got.dtype == q.dtype
    group = q.shape[1] // k.shape[1]
    truth = reference.attention(q.double(), k.double(), v.double(), visible, SCALE, bias)[0]
    allowed = TOLERANCE
    if q.dtype in LOW:
        wide = [x.repeat_interleave(group, 1) for x in (k, v)]
        scores = (q @ wide[0].transpose(-1, -2)).float() * SCALE
        scores = scores if bias is None else scores + bias
        scores = scores if visible is None else scores.masked_fill(~visible, -math.inf)
        plain = scores.softmax(-1).nan_to_num(0).to(q.dtype) @ wide[1]
        allowed = 2 * error_of(plain, truth)
    assert error_of(got, truth) <= allowed


def wrong(*args, **kwargs):
    """A negative control: the same check must fail."""
    with pytest.raises(AssertionError):
        check(*args, **kwargs)


def masks(first, kv_len, block, batch, heads, device, share=0.4):
    """Block mask and column mask; the last head of the last row lists nothing at all."""
    make = torch.Generator().manual_seed(kv_len)
    query_blocks, key_blocks = range(first // block, -(-kv_len // block)), -(-kv_len // block)
    blocks = torch.rand(batch, heads, len(query_blocks), key_blocks, generator=make) < share
    blocks[:, :, torch.arange(len(query_blocks)), torch.tensor(query_blocks)] = True
    columns = torch.rand(batch, heads, kv_len, generator=make) < share / 2
    blocks[-1, -1], columns[-1, -1] = False, False
    return blocks.to(device), columns.to(device)


def listed(blocks, columns, block, first, kv_len) -> BlockList:
    """With numbers no reader may use after the counts."""
    made = BlockList.from_mask(blocks, columns, block=block, first=first, kv_len=kv_len)
    junk = made.counts.new_full((*made.counts.shape, 3), 1 << 26)
    more = made.columns.new_full((*made.columns.shape[:2], 5), 1 << 26)
    past = torch.arange(made.indices.shape[3], device=junk.device) >= made.counts[..., None]
    indices = torch.cat([made.indices.masked_fill(past, 1 << 26), junk], 3)
    past = torch.arange(made.columns.shape[2], device=junk.device) >= made.column_counts[..., None]
    columns = torch.cat([made.columns.masked_fill(past, 1 << 26), more], 2)
    return BlockList(block, first, kv_len, indices, made.counts, columns, made.column_counts)


def sparse(shape, first, kv_len, device, dtype, block=64, shared=False):
    batch, kv_heads, group, _ = shape
    blocks, columns = masks(first, kv_len, block, batch, kv_heads * (1 if shared else group), device)
    q, k, v = random_qkv(shape, kv_len - first, kv_len, device, dtype)
    got = calls.sparse(triton, q, k, v, listed(blocks, columns, block, first, kv_len), SCALE)
    clean = BlockList.from_mask(blocks, columns, block=block, first=first, kv_len=kv_len)
    visible = clean.visible().repeat_interleave(group if shared else 1, 1)
    check(got, q, k, v, visible)
    return got, (q, k, v), visible


def sparse_control(device, dtype):
    """Dropped keys are seen, and columns in blocks that are listed too count once."""
    got, (q, k, v), visible = sparse((1, 1, 2, 64), 0, 200, device, dtype)
    for keys in (slice(0, 1), slice(140, 156)):
        less = visible.clone()
        assert less[..., keys].any()
        less[..., keys] = False
        wrong(got, q, k, v, less)
    blocks, columns = masks(0, 200, 64, 1, 2, device)
    columns[:, 0] |= blocks[:, 0, 3].repeat_interleave(64, -1)[..., :200]  # columns in blocks that are listed too
    made = BlockList.from_mask(blocks, columns, block=64, first=0, kv_len=200)
    assert (made.column_mask() & made.block_mask()[:, :, 3].repeat_interleave(64, -1)[..., :200]).any()
    check(calls.sparse(triton, q, k, v, made, SCALE), q, k, v, made.visible())


def sparse_rows_alone(device, dtype):
    """As attention.py hands over a left-padded batch: the real tokens of one row, slices of everything."""
    q, k, v = random_qkv((2, 2, 2, 64), 130, 140, device, dtype)
    start = 33
    row = (slice(1, 2), slice(None))
    alone = q[(*row, slice(start - 10, None))], k[(*row, slice(start, None))], v[(*row, slice(start, None))]
    blocks, columns = masks(0, 107, 64, 1, 4, device)
    made = listed(blocks, columns, 64, 0, 107)
    check(
        calls.sparse(triton, *alone, made, SCALE),
        *alone,
        BlockList.from_mask(blocks, columns, block=64, first=0, kv_len=107).visible(),
    )


def streaming(shape, q_len, total, sink, recent, device, dtype, dropped=0):
    q, k, v = random_qkv(shape, q_len, total, device, dtype)
    first = min(sink, total) + dropped
    parts = (k[:, :, :sink], v[:, :, :sink], k[:, :, first:], v[:, :, first:])
    got = calls.streaming(triton, q, *parts, recent=recent, first=first, scale=SCALE)
    check(got, q, k, v, reference.streaming_visible(q_len, total, sink, recent, device))
    return got, q, k, v


def streaming_control(device, dtype):
    got, q, k, v = streaming((1, 1, 2, 64), 130, 130, 5, 40, device, dtype)
    for sink, recent in ((5, 39), (5, 41), (4, 40)):
        wrong(got, q, k, v, reference.streaming_visible(130, 130, sink, recent, device))


def cut(k, v, cuts):
    bounds = zip([0, *cuts], [*cuts, k.shape[2]], strict=True)
    return [Segment(in_nan_buffer(k[:, :, a:b]), in_nan_buffer(v[:, :, a:b]), b - a) for a, b in bounds]


def decode(shape, kv_len, cuts, device, dtype):
    q, k, v = random_qkv(shape, 1, kv_len, device, dtype)
    got = calls.decode(triton, q, cut(k, v, cuts), SCALE)
    check(got, q, k, v, None)
    assert torch.equal(causal(triton, q, cut(k, v, cuts), SCALE), got), "one query is a decode"
    return got, q, k, v


def decode_control(device, dtype):
    got, q, k, v = decode((1, 2, 2, 64), 129, (), device, dtype)
    wrong(got, q, k[:, :, :97], v[:, :, :97], None)
    wrong(got, q, k.flip(1), v.flip(1), None)


def decode_lengths(device, dtype):
    """A length per row, one of them 0; NaN after each; biases of every shape, some of which hide keys."""
    batch, heads = 3, 2
    q, k, v = random_qkv((batch, heads, 4, 64), 1, 330, device, dtype)
    length = torch.tensor([13, 330, 0], device=device)
    empty = (torch.arange(330, device=device) >= length[:, None])[:, None, :, None]
    plain = Segment(*(random_tensor(batch, heads, 9, 64, device=device, dtype=dtype, seed=s) for s in (5, 6)), 9)
    noisy = random_tensor(330, device=device, dtype=torch.float32)
    hides = torch.where(noisy > 0.5, -math.inf, noisy)
    per_head = random_tensor(batch, heads, 1, 330, device=device, dtype=torch.float32)
    for bias in (None, hides, per_head, noisy[:1].view(1, 1, 1, 1)):
        ragged = Segment(k.masked_fill(empty, math.nan), v.masked_fill(empty, math.nan), length, bias)
        keys, values = (
            torch.cat([plain.k, k.masked_fill(empty, 0)], 2),
            torch.cat([plain.v, v.masked_fill(empty, 0)], 2),
        )
        added = torch.zeros(batch, heads, 1, 339, device=device)
        added[..., 9:] = 0 if bias is None else bias
        added = added.repeat_interleave(4, 1)
        visible = torch.arange(-9, 330, device=device) < length[:, None, None, None]
        check(calls.decode(triton, q, [plain, ragged], SCALE), q, keys, values, visible, added)
        alone = calls.decode(triton, q, [ragged], SCALE)
        check(alone, q, keys[:, :, 9:], values[:, :, 9:], visible[..., 9:], added[..., 9:])
        assert (alone[2] == 0).all()
        if bias is not None and bias.numel() > 1:  # one number for all keys changes nothing
            wrong(alone, q, keys[:, :, 9:], values[:, :, 9:], visible[..., 9:])


def attend_layer(device, dtype):
    """Both roles in one launch: interleaved heads, one role long and one short, in two segments."""
    batch, group, dim = 2, 7, 64
    q = random_tensor(batch, 5 * group, 1, dim, device=device, dtype=dtype)
    parts, checks = [], []
    for role, kv_heads, kv_len, cuts in (("retrieval", (0, 3), 700, ()), ("streaming", (1, 2, 4), 90, (5, 70))):
        heads = RoleHeads(role, kv_heads, 5)
        _, k, v = random_qkv((batch, len(kv_heads), group, dim), 1, kv_len, device, dtype)
        parts.append(HeadKV(heads, cut(k, v, cuts), None))
        checks.append((heads, k, v))
    for order in (parts, parts[::-1]):
        given = [(part.heads.kv_heads, part.segments) for part in order]
        got, lse = triton.attend_layer(q, given, Scores(SCALE))
        for heads, k, v in checks:
            check(heads.take(got, group), heads.take(q, group), k, v, None)
            exact = reference.attention(heads.take(q, group).double(), k.double(), v.double(), None, SCALE)[1]
            assert (heads.take(lse, group) - exact).abs().max() < 1e-4
    wrong(heads.take(got.roll(group, 1), group), heads.take(q, group), k, v, None)
    with pytest.raises(triton.UnsupportedModeError, match=r"the KV heads \[0, 3\] for 35 query heads"):
        triton.attend_layer(q, given[1:], Scores(SCALE))


def empties(device, dtype):
    """Nothing to do gives empty or zero."""
    q, k, v = random_qkv((1, 2, 4, 64), 1, 8, device, dtype)
    none = Segment(k[:, :, :0], v[:, :, :0], 0)
    assert (calls.decode(triton, q, [none], SCALE) == 0).all()
    check(calls.decode(triton, q, [none, Segment(k, v, 8)], SCALE), q, k, v, None)
    assert calls.decode(triton, q[:0], [Segment(k[:0], v[:0], 8)], SCALE).shape == (0, 8, 1, 64)
    assert calls.decode(triton, q[:, :0], [Segment(k[:, :0], v[:, :0], 8)], SCALE).shape == (1, 0, 1, 64)
    got = calls.streaming(triton, q[:, :, :0], k[:, :, :2], v[:, :, :2], k, v, recent=4, first=2, scale=SCALE)
    assert got.shape == (1, 8, 0, 64)


def refusals(device, dtype):
    """What the kernels would misread is refused."""
    q, k, v = random_qkv((1, 2, 4, 64), 70, 70, device, dtype)
    made = listed(*masks(0, 70, 64, 1, 8, device), 64, 0, 70)
    small = listed(*masks(0, 70, 4, 1, 8, device), 4, 0, 70)
    for change, match in (
        ((q, k.double(), v, made), "float64"),
        ((q, k[..., :32], v[..., :32], made), "head_dim"),
        ((q[:, :7], k, v, made), "7 heads of 70 queries"),
        ((q, k[:, :, :69], v[:, :, :69], made), "of 69 keys, with 8 lists for 70 queries"),
        ((q[:, :, 1:], k, v, made), "of 69 queries, 2 of 70 keys"),
        ((q, k, v, small), "not of 4"),
        ((q, k, v, listed(*masks(0, 70, 64, 2, 8, device), 64, 0, 70)), "list of 2 rows"),
        ((q, k, v, listed(*masks(0, 70, 64, 1, 4, device), 64, 0, 70)), "with 4 lists"),
    ):
        with pytest.raises(triton.UnsupportedModeError, match=match):
            calls.sparse(triton, *change, SCALE)
    dense = triton.attend(q, [Segment(k, v, 70)], ALL, Scores(SCALE), want_lse=False)[0]
    check(dense, q, k, v, None)  # by the cpu kernel


def logsumexp(device, dtype):
    """Of each kernel, with queries that read nothing."""
    q, k, v = random_qkv((2, 2, 2, 64), 70, 200, device, dtype)
    whole = [Segment(k, v, 200)]
    made = listed(*masks(130, 200, 64, 2, 4, device), 64, 130, 200)
    window = [Segment(k[:, :, :5], v[:, :, :5], 5), Segment(k[:, :, 9:], v[:, :, 9:], 191)]
    ragged = [Segment(k, v, torch.tensor([200, 0], device=device))]
    for asked, segments, reads in (
        (q, whole, made), (q, window, Window(40, 9)), (q[:, :, :1], whole, ALL), (q[:, :, :1], ragged, ALL),
    ):  # fmt: skip
        got = triton.attend(asked, segments, reads, Scores(SCALE))[1]
        exact = [Segment(one.k.double(), one.v.double(), one.length) for one in segments]
        want = reference.attend(asked.double(), exact, reads, Scores(SCALE))[1]
        nothing = want == -math.inf
        assert torch.equal(got == -math.inf, nothing)
        assert (got - want).masked_fill(nothing, 0).abs().max() < 1e-4
        assert (got - 1.01 * want).masked_fill(nothing, 0).abs().max() > 1e-3, "a control"
    assert nothing.any() and not nothing.all()


def decode_quantised(nth, device, dtype):
    shape, segments = list(packed_cases(dtype, device))[nth]
    q = random_numbers(shape[0], shape[1] * shape[2], 1, shape[3], dtype=dtype, seed=3).to(device)
    got, want = calls.decode(triton, q, segments, SCALE), truth(q, segments)
    allowed = (4 * torch.finfo(dtype).eps if dtype in LOW else TOLERANCE) * float(want.abs().max())
    assert got.dtype == dtype and error_of(got, want) <= allowed
    assert error_of(got, truth(q, segments, turn=1)) > allowed


def decode_quantised_nan(device, dtype):
    """A NaN comes through, and what the kernel does not compute is left to others."""
    shape = (1, 2, 2, 64)
    piece, q = (
        packed(shape, 128, 4, 64, dtype=dtype, device=device),
        random_tensor(1, 4, 1, 64, device=device, dtype=dtype),
    )
    assert calls.decode(triton, q, [piece], SCALE).isfinite().all()
    for other in (q.double(), q[..., :32]):
        with pytest.raises(triton.UnsupportedModeError, match="packed keys of the dtype, device and head_dim"):
            calls.decode(triton, other, [piece], SCALE)
    piece.k_scale[0, 1, 1, 0, 5] = math.nan
    got = calls.decode(triton, q, [piece], SCALE)
    assert got[:, 2:].isnan().all() and got[:, :2].isfinite().all()


def cases(dtypes):
    """Name -> (function, arguments but for the device)."""
    wide, found = dtypes[0], {}

    def add(function, *args, **kwargs):
        name = " ".join([function.__name__, *map(str, args), *(f"{k}={v}" for k, v in kwargs.items())])
        found[name] = lambda device: function(*args, device=device, **kwargs)

    # Shapes are (B, n, G, D), lengths odd; every value of each next to several of the others, not the full product.
    for shape, first, kv_len, more in (
        ((1, 1, 1, 64), 0, 1, {}),
        ((1, 1, 4, 64), 0, 63, {}),
        ((2, 1, 1, 96), 0, 64, {}),
        ((1, 2, 4, 64), 0, 65, {"shared": True}),
        ((1, 1, 7, 128), 0, 129, {}),
        ((1, 1, 8, 64), 63, 129, {}),
        ((1, 1, 4, 64), 70, 71, {}),
        ((2, 1, 1, 256), 200, 329, {}),
        ((1, 1, 4, 64), 20, 90, {"block": 16, "shared": True}),
        ((1, 1, 2, 8), 5, 300, {"block": 128}),
    ):
        add(sparse, shape, first, kv_len, dtype=wide, **more)
    for dtype in dtypes[1:]:
        add(sparse, (1, 1, 2, 96), 30, 150, dtype=dtype)
        add(streaming, (1, 1, 2, 96), 150, 150, 5, 40, dtype=dtype)
        add(decode, (2, 1, 4, 128), 300, (40,), dtype=dtype)
    for shape, q_len, total, sink, recent, dropped in (
        ((1, 1, 1, 64), 1, 1, 5, 40, 0),
        ((1, 1, 4, 64), 63, 63, 5, 40, 0),
        ((2, 1, 1, 96), 129, 129, 0, 40, 0),
        ((1, 1, 7, 64), 65, 200, 5, 40, 91),
        ((1, 1, 8, 128), 2, 300, 70, 130, 0),
        ((1, 2, 1, 64), 64, 67, 5, 1, 0),
        ((1, 1, 1, 256), 90, 95, 80, 30, 0),
    ):
        add(streaming, shape, q_len, total, sink, recent, dtype=wide, dropped=dropped)
    for shape, kv_len, cuts in (
        ((1, 1, 1, 64), 1, ()),
        ((2, 2, 4, 64), 63, ()),
        ((1, 1, 7, 96), 65, (64,)),
        ((2, 1, 8, 128), 700, ()),
        ((1, 1, 1, 256), 257, (10, 200)),
        ((1, 1, 32, 8), 129, (0, 40)),
    ):
        add(decode, shape, kv_len, cuts, dtype=wide)
    for nth in range(PACKED):
        add(decode_quantised, nth, dtype=wide)
    for dtype in dtypes[1:]:
        add(decode_quantised, 1, dtype=dtype)
    add(decode_quantised_nan, dtype=wide)
    for function in (sparse_control, sparse_rows_alone, streaming_control, decode_control, decode_lengths):
        add(function, dtype=wide)
    for function in (attend_layer, logsumexp, empties, refusals, one_launch_per_layer, forks, benchmark):
        add(function, dtype=wide)
    return found


def failures(device: torch.device, found) -> dict[str, str | None]:
    """What went wrong in each case."""
    said = {}
    for name, run in found.items():
        try:
            run(device)
            said[name] = None
        except (Exception, pytest.fail.Exception):  # noqa: BLE001 - reported
            said[name] = traceback.format_exc()
    return said


def widen_bfloat16():
    """Let the interpreter compute tl.dot of bfloat16.

    It documents that it has no bfloat16 arithmetic: it multiplies the bits as integers. Its casts are right, but that
    to bfloat16 cuts where a GPU rounds.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def widened(self, a, b, *rest):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    InterpreterBuilder.create_dot = widened


if __name__ == "__main__":
    widen_bfloat16()
    triton.supports = lambda *case: None  # the interpreter is a device that it computes on
    torch.set_num_threads(1)
    json.dump(failures(torch.device("cpu"), cases((torch.float32, *LOW))), sys.stdout)
