"""What holds for every file of prefill/: shapes and order of its lists, no dependence on other heads, rows or runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import calls
from helpers.pattern_cases import CLASSES, RETRIEVAL, tight
from helpers.tiny import config_for, left_padded, tiny_model

from hf_longctx import patched, report
from hf_longctx.errors import UnsupportedModeError
from hf_longctx.kernels import reference
from hf_longctx.prefill.base import BLOCK, PatternSpec, select

SIZES = [(1, 1), (63, 63), (64, 64), (65, 65), (127, 127), (128, 128), (129, 129), (300, 300)]
CHUNKS = [(1, 300), (64, 129), (130, 257), (128, 333)]


def random_qk(q_len, kv_len, kv_heads=2, group=2, batch=2):
    make = torch.Generator().manual_seed(kv_len)
    q = torch.randn(batch, kv_heads * group, q_len, 8, generator=make, dtype=torch.float64)
    return q, torch.randn(batch, kv_heads, kv_len, 8, generator=make, dtype=torch.float64)


def same(a, b) -> bool:
    """Whether two lists name the same keys, whatever their widths."""
    return (
        (a.block, a.first, a.kv_len) == (b.block, b.first, b.kv_len)
        and torch.equal(a.block_mask(), b.block_mask())
        and torch.equal(a.column_mask(), b.column_mask())
    )


def test_the_files_are_found():
    assert {"dense", "block_topk"} < set(RETRIEVAL) < set(CLASSES)
    assert all(issubclass(cls, PatternSpec) for cls in CLASSES.values())


def test_a_pattern_without_lists_says_so():
    q, k = random_qk(130, 130)
    with pytest.raises(UnsupportedModeError, match="SinkRecent makes no block list"):
        select((CLASSES["sink_recent"](),) * 4, q, k, 0.5)


@pytest.mark.parametrize(("q_len", "kv_len"), SIZES + CHUNKS)
@pytest.mark.parametrize("word", RETRIEVAL)
def test_lists_are_sound(word, q_len, kv_len):
    q, k = random_qk(q_len, kv_len)
    spec = tight(RETRIEVAL[word])
    lists = select((spec,) * 4, q, k, 0.5)
    first = kv_len - q_len
    blocks = torch.arange(first // BLOCK, -(-kv_len // BLOCK))
    assert (lists.block, lists.first, lists.kv_len) == (BLOCK, first, kv_len)
    assert lists.counts.shape == (2, 4, len(blocks))
    mask = lists.block_mask()
    assert mask[:, :, torch.arange(len(blocks)), blocks].all(), "the block of the query itself"
    assert mask[..., 0].all(), "the sinks"
    assert not (mask & (torch.arange(mask.shape[3]) > blocks[:, None])).any()
    assert torch.equal(lists.counts, mask.sum(-1, dtype=torch.int32))
    assert torch.equal(lists.column_counts, lists.column_mask().sum(-1, dtype=torch.int32))
    assert same(lists, select((spec,) * 4, q, k, 0.5))
    if type(spec).reads_all:
        assert lists.density == 1.0
    elif (q_len, kv_len) == (300, 300):
        assert lists.density < 1.0


@pytest.mark.parametrize(("q_len", "kv_len"), [(300, 300), *CHUNKS])
@pytest.mark.parametrize("word", RETRIEVAL)
def test_a_list_depends_on_its_own_head_and_row(word, q_len, kv_len):
    q, k = random_qk(q_len, kv_len)
    spec = tight(RETRIEVAL[word])
    together = select((spec,) * 4, q, k, 0.5)
    for row in range(2):
        for kv in range(2):
            heads = slice(2 * kv, 2 * kv + 2)
            alone = select((spec,) * 2, q[row : row + 1, heads], k[row : row + 1, kv : kv + 1], 0.5)
            assert torch.equal(alone.block_mask(), together.block_mask(heads)[row : row + 1])
            assert torch.equal(alone.column_mask(), together.column_mask(heads)[row : row + 1])


@pytest.mark.parametrize("word", RETRIEVAL)
def test_selection_carries_no_gradient(word):
    q, k = (x.requires_grad_() for x in random_qk(150, 150))
    lists = select((tight(RETRIEVAL[word]),) * 4, q, k, 0.5)
    v = torch.randn(2, 2, 150, 8, dtype=torch.float64)
    out = calls.sparse(reference, q, k, v, lists, 0.5)
    assert torch.isfinite(torch.autograd.grad(out.square().sum(), (q, k))[0]).all()


@pytest.mark.parametrize(("q_len", "kv_len"), [(500, 500), (130, 457)])
@pytest.mark.parametrize("others", [1, 3])
def test_a_table_of_all_patterns_equals_each_alone(others, q_len, kv_len):
    """Every pattern in turn, in heads of one group and of several, tight and with its defaults."""
    specs = [spec for cls in RETRIEVAL.values() for spec in (tight(cls), cls())]
    heads = tuple(specs[(others * i) % len(specs)] for i in range(8))
    q, k = random_qk(q_len, kv_len, kv_heads=2, group=4)
    mixed = select(heads, q, k, 0.5)
    assert mixed.counts.shape[1] == 8
    for h, spec in enumerate(heads):
        alone = select((spec,), q[:, h : h + 1], k[:, h // 4 : h // 4 + 1], 0.5)
        assert torch.equal(mixed.block_mask(slice(h, h + 1)), alone.block_mask())
        assert torch.equal(mixed.column_mask(slice(h, h + 1)), alone.column_mask())
    assert any(not torch.equal(mixed.counts[:, 0], mixed.counts[:, h]) for h in range(8))


@pytest.mark.parametrize("word", RETRIEVAL)
@torch.no_grad()
def test_a_patched_model_runs_the_pattern(word):
    """Rows of a padded batch read what they read alone, and only the pattern that lists everything reads it."""
    model = tiny_model("llama", torch.float64, layers=2)
    tightest = {f.name: f.metadata["min"] for f in dataclasses.fields(RETRIEVAL[word]) if "min" in f.metadata}
    sparse = {"min_tokens": 0, "retrieval": {"pattern": word, **tightest}}
    ids, mask = left_padded([300, 200])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with patched(model, config_for(model, "retrieval")):
        dense = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    with patched(model, config_for(model, "retrieval", prefill=sparse)):
        got = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        assert report(model).sparse == (0 if RETRIEVAL[word].reads_all else 4)
        for row, length in enumerate([300, 200]):
            alone = model(ids[row : row + 1, -length:], use_cache=False).logits[0]
            torch.testing.assert_close(got[row, -length:], alone, rtol=0, atol=1e-6)
    error = (got - dense)[mask.bool()].abs().max()
    assert error <= 1e-6 if RETRIEVAL[word].reads_all else error > 1e-4


def test_patterns_with_other_blocks_do_not_mix():
    class Wide(CLASSES["dense"]):
        @classmethod
        def select(cls, heads, q, k, scale):
            return dataclasses.replace(super().select(heads, q, k, scale), block=128)

    q, k = random_qk(130, 130)
    with pytest.raises(UnsupportedModeError, match=r"\[64, 128\] tokens"):
        select((Wide(), CLASSES["dense"]()) * 2, q, k, 0.5)
