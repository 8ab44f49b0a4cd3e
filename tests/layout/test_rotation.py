"""Turning by positions: on, back, and by the mean of several."""

from __future__ import annotations

import pytest
import torch

from hf_longctx.layout.rotation import Rotation

SOME = Rotation((1.0, 0.3, 0.01))


def same(got, want) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_turning_back_is_the_inverse():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    by = torch.tensor([0, 1, -7, 1000, 123456])
    same(SOME.turn(SOME.turn(x, by), -by), x)
    same(SOME.turn(SOME.turn(x, by), by), SOME.turn(x, 2 * by))
    assert (SOME.turn(x, by) - x)[..., 1:, :6].abs().max() > 0.1
    assert torch.equal(SOME.turn(x, by)[..., 6:], x[..., 6:])
    assert SOME.turn(x.to(torch.bfloat16), by).dtype == torch.float32


@pytest.mark.parametrize("dim", [6, 8])
def test_a_mean_of_turns_is_a_matrix(dim):
    x, by = torch.randn(4, dim, dtype=torch.float64), torch.arange(40, 57)
    each = torch.stack([SOME.turn(x, by[i : i + 1].expand(4)) for i in range(len(by))])
    same(x @ SOME.mean(dim, by), each.mean(0))


def test_no_frequencies_turn_nothing():
    x, by = torch.randn(4, 8), torch.arange(4)
    assert torch.equal(Rotation(()).turn(x, by), x)
    assert torch.equal(Rotation(()).mean(8, by), torch.eye(8, dtype=torch.float64))
