"""Tokens of heads that keep different numbers of them, and what becomes of them as sequences come and go."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from helpers.ragged_cases import ragged

from hf_longctx.cache.bytes import storage_bytes
from hf_longctx.errors import UnsupportedModeError
from hf_longctx.layout import ragged as layout
from hf_longctx.layout.ragged import Ragged

pytestmark = pytest.mark.quick
LENGTHS = [[3, 0, 1], [0, 5, 2], [1, 1, 4]]
ROWS, HEADS, DIM = 3, 3, 16


def made(bias=True, dtype=torch.float64) -> Ragged:
    """Without anything beside the parts."""
    return Ragged.of(parts(ragged(LENGTHS, DIM, dtype, bias)))


def parts(of: Ragged):
    return [[part(of, row, n) for n in range(of.form[1])] for row in range(of.form[0])]


def part(of: Ragged, row, n):
    own = of.of_head(row, n)
    found = (of.k[own], of.v[own], of.positions[own])
    return found if of.score_bias is None else (*found, of.score_bias[own])


def alike(one: Ragged, other: Ragged, rows=range(ROWS)) -> bool:
    """Whether the sequences of ``one`` are these of ``other``."""
    pairs = [(part(one, row, n), part(other, other_row, n)) for row, other_row in enumerate(rows) for n in range(HEADS)]
    return one.form[0] == len(rows) and all(
        len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) for a, b in pairs
    )


def test_parts_lie_one_after_the_other():
    one = made()
    assert one.starts.tolist() == [[0, 3, 3], [4, 4, 9], [11, 12, 13]] and one.lengths.tolist() == LENGTHS
    assert one.starts.dtype == one.lengths.dtype == torch.int64 and one.positions.dtype == torch.int32
    assert (one.longest, one.form, one.dtype, one.kind) == (5, (ROWS, HEADS, DIM), torch.float64, layout.KIND)
    assert one.positions.tolist() == [0, 3, 6, 0, 0, 3, 6, 9, 12, 0, 3, 0, 0, 0, 3, 6, 9]
    given = ragged(LENGTHS, DIM, torch.float64, True)
    assert alike(one, given) and not alike(one, given, [0, 2, 1])
    assert Ragged.of([[given_part[:3] for given_part in row] for row in parts(given)]).score_bias is None


def test_the_cache_can_be_continued_outside_of_inference_mode():
    with torch.inference_mode():
        one = made()
        one.map_rows(lambda x: x[:1])
    assert not (one.k.is_inference() or one.v.is_inference() or one.positions.is_inference())


def test_a_head_is_a_view():
    one = made()
    head = one.head(1, 1)
    assert head.k.shape == head.v.shape == (1, 1, 5, DIM) and head.length == 5 and head.bias.shape == (1, 1, 1, 5)
    assert head.k.data_ptr() == one.k[4:].data_ptr() and torch.equal(head.v[0, 0], one.v[4:9])
    assert torch.equal(head.bias[0, 0, 0], one.score_bias[4:9]) and made(bias=False).head(0, 0).bias is None
    assert one.head(0, 1).k.shape == (1, 1, 0, DIM)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block", [1, 2, 4, 5, 100])
def test_blocks_hold_every_token_once_and_hide_the_rest(block, bias, monkeypatch):
    monkeypatch.setattr(layout, "BLOCK", block)
    for one in (made(bias), ragged(LENGTHS, DIM, torch.float64, bias)):
        blocks = list(one.blocks())
        assert [part.length for part in blocks] == [min(block, 5 - low) for low in range(0, 5, block)]
        k, v, added = (
            torch.cat([getattr(x, name) for x in blocks], dim) for name, dim in (("k", 2), ("v", 2), ("bias", 3))
        )
        shown = added[:, :, 0] > -math.inf
        assert k.isfinite().all() and v.isfinite().all(), "what is hidden is no other's memory"
        assert torch.equal(shown, torch.arange(5) < one.lengths[..., None])
        for row, heads in enumerate(parts(one)):
            for n, (keys, values, _, *own) in enumerate(heads):
                assert torch.equal(k[row, n][shown[row, n]], keys) and torch.equal(v[row, n][shown[row, n]], values)
                assert torch.equal(added[row, n, 0][shown[row, n]].float(), own[0] if bias else torch.zeros(len(keys)))


def test_nothing_at_all_is_one_block_without_tokens():
    for given in (ragged([[0, 0]], DIM, torch.float64), Ragged.of(parts(ragged([[0, 0]], DIM, torch.float64)))):
        (block,) = given.blocks()
        assert (
            block.length == 0 and block.k.shape == block.v.shape == (1, 2, 0, DIM) and block.bias.shape == (1, 2, 1, 0)
        )
        first, rest = given.first_apart()
        assert (first.bias == -math.inf).all() and first.k.shape == (1, 2, 1, DIM) and not first.k.any()
        assert rest.longest == 0


def test_the_first_token_is_that_at_the_position_0():
    given = ragged(LENGTHS, DIM, torch.float64, True, lost=((0, 0), (1, 1)))
    held = torch.tensor([[False, False, True], [False, False, True], [True, True, True]])
    first, rest = given.first_apart()
    assert torch.equal(first.bias[:, :, 0, 0] > -math.inf, held) and first.length == 1
    assert torch.equal(rest.lengths, given.lengths - held.long()) and rest.k is given.k
    for row, n in held.nonzero().tolist():
        own = given.of_head(row, n).start
        assert torch.equal(first.k[row, n, 0], given.k[own]) and torch.equal(first.v[row, n, 0], given.v[own])
        assert first.bias[row, n, 0, 0] == given.score_bias[own] and rest.of_head(row, n).start == own + 1
    assert not first.k[~held].any()


def test_it_never_comes_in_one_piece():
    one = made()
    for whole in (one.contents, lambda: one.span(0, 1), lambda: one.take(torch.zeros(3, 3, 1, dtype=torch.int64))):
        with pytest.raises(UnsupportedModeError, match="no keys and values of one shape"):
            whole()


def test_some_sequences_alone_are_views():
    one = made()
    other = one.alone(slice(1, 3))
    assert alike(other, one, [1, 2]) and other.k is one.k
    assert other.starts.is_contiguous() and other.lengths.is_contiguous()


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1], [0, 0, 1, 1, 2, 2], [1, 1, 1], [2], [0, 2], []], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_rows_are_reordered_repeated_and_selected(rows, bias):
    """Those that come from one share its part; the memory of those that went is given back."""
    for given in (made(bias), ragged(LENGTHS, DIM, torch.float64, bias)):
        other, before = given.copy(), [x.clone() for x in given.tensors()]
        other.map_rows(lambda x: x[rows])
        assert alike(other, given, rows)
        kept = sum(sum(LENGTHS[row]) for row in set(rows))
        assert len(other.k) == len(other.v) == len(other.positions) == kept
        assert not bias or len(other.score_bias) == kept
        assert other.starts.is_contiguous() and other.lengths.is_contiguous()
        assert other.starts.dtype == other.lengths.dtype == torch.int64
        assert all(torch.equal(x.nan_to_num(0), y.nan_to_num(0)) for x, y in zip(given.tensors(), before, strict=True))


def test_the_memory_is_that_of_the_tokens():
    one = made()
    tokens = 17 * (2 * DIM * 8 + 4 + 4)
    assert storage_bytes(one.tensors()) == tokens + 2 * 9 * 8
    assert len(list(made(bias=False).tensors())) == 5
    one.map_rows(lambda x: x.repeat_interleave(4, 0))
    assert storage_bytes(one.tensors()) == tokens + 2 * 36 * 8, "forks share it"
    one.map_rows(lambda x: x[[0, 1, 2, 3]])
    assert storage_bytes(one.tensors()) == 4 * (2 * DIM * 8 + 8) + 2 * 12 * 8


def test_rows_that_stay_move_nothing():
    one = made()
    where = one.k.data_ptr()
    one.map_rows(lambda x: x[[2, 1, 0, 0]])
    assert one.k.data_ptr() == where
    one.map_rows(lambda x: x[[0]])
    assert one.k.data_ptr() != where, "a control"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "change", [Ragged.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "deep", "pickle"]
)
def test_copies_go_on_by_themselves(change, bias):
    one = made(bias)
    other = change(one)
    other.map_rows(lambda x: x[[2, 2]])
    assert alike(one, made(bias)) and alike(other, one, [2, 2])


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_restored_with_memory_of_its_own(bias):
    one = made(bias)
    one.map_rows(lambda x: x[[1, 1, 0]])
    tensors, numbers = one.saved()
    other = Ragged.restored(tensors, numbers, torch.device("cpu"))
    assert alike(other, one) and not alike(other, replace(one, k=one.k + 1))
    assert set(tensors) == {"k", "v", "positions", "starts", "lengths", *(["score_bias"] * bias)}
    ours = {x.data_ptr() for x in one.tensors()}
    assert not ours & {x.data_ptr() for x in other.tensors()}
    assert storage_bytes(tensors.values()) == storage_bytes(one.tensors()), "what is shared is kept once"
