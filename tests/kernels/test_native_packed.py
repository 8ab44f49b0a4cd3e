"""Decode over packed keys by the native kernel, against the numbers that the codes stand for in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.calls import decode
from helpers.native_builds import (
    BUILDS,  # noqa: F401 - a fixture
    other_build,  # noqa: F401 - a fixture
)
from helpers.packed_cases import SCALE, cases, packed, random_numbers, truth

from hf_longctx.errors import UnsupportedModeError
from hf_longctx.kernels import base, native
from hf_longctx.kernels import base as dispatch
from hf_longctx.layout.forward import Forward
from hf_longctx.layout.reads import ALL
from hf_longctx.layout.rows import Rows
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import Segment

DTYPES = [torch.float32, torch.bfloat16]


def query(shape, dtype):
    batch, heads, group, dim = shape
    return random_numbers(batch, heads * group, 1, dim, dtype=dtype, seed=3)


def error_of(got, want) -> float:
    return float((got.double() - want).abs().max())


def check(dtype):
    """All that is rounded to the dtype is the answer; sums are float32."""
    count, half = 0, torch.finfo(dtype).eps / 2
    for shape, segments in cases(dtype):
        q = query(shape, dtype)
        got, want = decode(native, q, segments, SCALE), truth(q, segments)
        assert got.dtype == dtype and got.shape == q.shape
        allowed = (half + 1e-5) * want.abs().max()
        assert error_of(got, want) <= allowed, shape
        forward = Forward(Rows(q.shape[0], 0, 1))
        by_blocks = base.attend("cpu", q, segments, ALL, Scores(SCALE), forward)[0]
        assert error_of(by_blocks, want) <= 5 * allowed, shape
        assert error_of(got, truth(q, segments, turn=1)) > allowed, shape
        count += 1
    assert count == 7


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_read_as_the_numbers_they_stand_for(dtype):
    assert native.supports(dispatch.Case(torch.device("cpu"), dtype, 64)) is None
    check(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other_build", BUILDS and [*BUILDS, "-mno-avx512vnni"], indirect=True)
@pytest.mark.usefixtures("other_build")
def test_on_other_cpus(dtype):
    check(dtype)


def test_threads_do_not_change_the_answer():
    shape = (1, 4, 4, 128)
    q, segments = query(shape, torch.float32), [packed(shape, 8192, 8, 64, dtype=torch.float32)]
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outs.append(decode(native, q, segments, SCALE))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_nan_comes_through(dtype, bits):
    shape = (1, 2, 2, 64)
    piece = packed(shape, 128, bits, 64, dtype=dtype)
    q = query(shape, dtype)
    assert decode(native, q, [piece], SCALE).isfinite().all()
    piece.k_scale[0, 1, 1, 0, 5] = math.nan
    got = decode(native, q, [piece], SCALE)
    assert got[:, 2:].isnan().all() and got[:, :2].isfinite().all()


def refused(q, segments):
    """`auto` and `native` go on block by block."""
    case = dispatch.case_of(q, segments, ALL, Scores(SCALE))
    assert native.supports(case) is not None
    with pytest.raises(UnsupportedModeError):
        native.attend(q, segments, ALL, Scores(SCALE))


def test_what_it_does_not_compute_it_leaves_to_others():
    width = native._load()[0].hf_longctx_width()
    shape = (1, 1, 2, width)
    odd = [packed(shape, 64, 4, 64, dtype=torch.float32)]
    refused(query(shape, torch.float32), odd)
    wide = (1, 1, 2, 64)
    q, piece = query(wide, torch.float32), packed(wide, 64, 8, 64, dtype=torch.float32)
    assert decode(native, q, [piece], SCALE) is not None
    refused(q.double(), [packed(wide, 64, 8, 64, dtype=torch.float64)])
    with pytest.raises(ValueError, match="do not belong together"):
        decode(native, q.bfloat16(), [piece], SCALE)
    with pytest.raises(UnsupportedModeError, match="one query over all of them"):
        native.attend(q.expand(-1, -1, 2, -1), [piece], ALL, Scores(SCALE))
    tail = Segment(*torch.randn(2, 1, 1, 5, 64), 5)
    assert decode(native, q, [piece, tail], SCALE) is not None
    tail.k.requires_grad_()
    refused(q, [piece, tail])
