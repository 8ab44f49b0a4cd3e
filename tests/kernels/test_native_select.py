"""Pages that the native kernel chooses, and tokens that read a choice in one call: what the definitions give."""

from __future__ import annotations

import pytest
import torch
from helpers.native_builds import other_build  # noqa: F401 - a fixture
from helpers.tiny import config_for, tiny_model

from hf_longctx import LongCtxCache, patch_model, report
from hf_longctx.cache.layer import LongCtxLayer
from hf_longctx.cache.seam import CACHE
from hf_longctx.decode._votes import best, vote
from hf_longctx.kernels import native, reference
from hf_longctx.layout.heads import RoleHeads
from hf_longctx.layout.segments import Listed, Place, Segment

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    (1, 2, 4, 16, 63, 1),
    (2, 3, 3, 64, 513, 1),
    (1, 1, 7, 128, 64, 4),
    (2, 8, 1, 64, 500, 2),
    (1, 2, 9, 256, 65, 1),
]


pytestmark = pytest.mark.usefixtures("native_on")


def bounds_of(batch, kv_heads, parts, dim, dtype):
    one, other = (torch.randn(batch, kv_heads, parts, dim).to(dtype) for _ in "ab")
    return torch.cat([torch.maximum(one, other), torch.minimum(one, other)], 3)


def wanted(q, bounds, sub, width):
    """In float64, whose ties are none of the narrower dtypes'."""
    scores = reference.page_scores(q.double(), bounds.double()).unflatten(2, (-1, sub)).amax(3)
    return best(vote(scores, bounds.shape[1], "max"), width)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_best_pages_are_those_of_the_definition(dtype, shape, threads):
    batch, kv_heads, group, dim, pages, sub = shape
    bounds = bounds_of(batch, kv_heads, pages * sub, dim, dtype)
    room = torch.full((batch, kv_heads, pages * sub + 5, 2 * dim), float("nan"), dtype=dtype)
    room[:, :, : pages * sub] = bounds
    q = torch.randn(batch, kv_heads * group, 1, dim).to(dtype)
    cut = pages * sub // 3
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for width in (1, pages // 2, pages):
            parts = [room[:, :, :cut], room[:, :, cut : pages * sub]]
            got = native.best_pages(q, parts, sub, width)
            assert torch.equal(got, wanted(q, bounds, sub, width))
            assert width == pages or not torch.equal(got, wanted(-q, bounds, sub, width)), "a control"
    finally:
        torch.set_num_threads(before)


def test_equal_pages_go_to_the_first_and_nan_to_none():
    bounds = bounds_of(1, 1, 1, 16, torch.float32).expand(-1, -1, 40, -1).clone()
    q = torch.randn(1, 2, 1, 16)
    assert native.best_pages(q, [bounds], 1, 7).tolist() == [[[0, 1, 2, 3, 4, 5, 6]]]
    bounds[:, :, 3] = float("nan")
    assert native.best_pages(q, [bounds], 1, 7).tolist() == [[[0, 1, 2, 4, 5, 6, 7]]]
    bounds[:] = float("nan")
    assert native.best_pages(q, [bounds], 1, 7).tolist() == [[[0, 1, 2, 3, 4, 5, 6]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("other_build")
def test_other_instruction_sets(dtype):
    test_the_best_pages_are_those_of_the_definition(dtype, SHAPES[1], 2)
    test_a_step_reads_what_is_listed(dtype, 2, True)


@pytest.mark.parametrize(
    "values", [[0.0, -0.0, 1e-38, -1e-38], [-3.0, -3.0000002, -2.9999998], [7.0, -7.0, 1e30, -1e30]]
)
@pytest.mark.parametrize("count", [1, 2, 63, 64, 4097])
def test_the_largest_of_any_numbers(values, count):
    """Scores that are the numbers themselves: near ones share a bin, equal ones go to the first."""
    bounds = torch.zeros(1, 1, count, 32)
    bounds[..., 0] = torch.tensor(values)[torch.randint(len(values), (count,))]
    q = torch.zeros(1, 1, 1, 16)
    q[..., 0] = 1
    for width in {1, (count + 1) // 2, max(1, count - 1), count}:
        assert torch.equal(native.best_pages(q, [bounds], 1, width), best(bounds[..., 0], width)[0])


def test_what_it_does_not_choose_is_left_to_the_definition(monkeypatch):
    bounds, q = bounds_of(1, 1, 8, 16, torch.float32), torch.randn(1, 2, 1, 16)
    assert native.best_pages(q, [bounds.double()], 1, 2) is None
    assert native.best_pages(q.double(), [bounds.double()], 1, 2) is None
    assert native.best_pages(q.requires_grad_(), [bounds], 1, 2) is None
    monkeypatch.setenv(native.SWITCH, "0")
    native._load.cache_clear()
    assert native.best_pages(q.detach(), [bounds], 1, 2) is None


@pytest.mark.parametrize(("sub", "width", "dim"), [(1, 0, 16), (1, 9, 16), (3, 1, 16), (1, 1, 32)])
def test_bounds_that_do_not_fit_are_refused(sub, width, dim):
    with pytest.raises(ValueError, match="kernel native was given"):
        native.best_pages(torch.randn(1, 2, 1, dim), [bounds_of(1, 1, 8, 16, torch.float32)], sub, width)


def listed_step(dtype, batch, counts):
    """(q, k, v, place, kv_heads) of a token that reads a list; slots that nobody wrote are NaN."""
    kv_heads, dim, length, size = 3, 32, 70, 4
    k, v = (torch.full((batch, kv_heads, 90, dim), float("nan"), dtype=dtype) for _ in "kv")
    for x in (k, v):
        x[:, :, : length - 1] = torch.randn(batch, kv_heads, length - 1, dim)
    entries = torch.stack([torch.randperm(9)[:5].sort().values + 2 for _ in range(batch * kv_heads)])
    entries = entries.view(batch, kv_heads, 5).int()
    listed = Listed(size, 2, 14, entries, torch.randint(1, 6, (batch, kv_heads)).int() if counts else None)
    q = torch.randn(batch, kv_heads * 2, 1, dim).to(dtype)
    new = [torch.randn(batch, kv_heads, 1, dim).to(dtype) for _ in "kv"]
    return q, *new, Place(Segment(k, v, length - 1), length - 1, length, listed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("counts", [False, True])
def test_a_step_reads_what_is_listed(dtype, batch, counts):
    q, k, v, place = listed_step(dtype, batch, counts)
    step = native.Step([RoleHeads("retrieval", (0, 1, 2), 3)])
    got = step.run(q, k, v, [place], 0.2).transpose(1, 2)
    segment, _, length, listed, _ = place
    reads = torch.zeros(batch, 3, length, dtype=torch.bool)
    reads[..., : listed.low * listed.size] = reads[..., listed.high * listed.size :] = True
    for row, head in torch.cartesian_prod(torch.arange(batch), torch.arange(3)).tolist():
        count = 5 if listed.counts is None else listed.counts[row, head]
        for entry in listed.entries[row, head, :count].tolist():
            reads[row, head, entry * listed.size : (entry + 1) * listed.size] = True
    whole = [x[:, :, :length].double() for x in (segment.k, segment.v)]
    assert torch.equal(whole[0][:, :, -1:], k.double()), "the token itself is written"
    want, _ = reference.attention(q.double(), *whole, reads.repeat_interleave(2, 1)[:, :, None], 0.2)
    dense, _ = reference.attention(q.double(), *whole, None, 0.2)
    error = 1e-5 if dtype == torch.float32 else 2e-2
    assert (got - want).abs().max() < error < (dense - want).abs().max()


def test_a_list_beyond_the_slots_is_refused():
    q, k, v, place = listed_step(torch.float32, 1, False)
    step = native.Step([RoleHeads("retrieval", (0, 1, 2), 3)])
    for listed in (place.listed._replace(high=18), place.listed._replace(low=15)):
        with pytest.raises(ValueError, match="for a length of 70"):
            step.run(q, k, v, [place._replace(listed=listed)], 0.2)


FEW = {"select": "page_bounds", "page": 4, "budget": 16, "sink": 4, "recent": 9, "min_tokens": 50, "dense_layers": 1}


@pytest.mark.spanning
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("more", [{}, {"refresh": 4}, {"vote": "mean"}, {"mass": 0.7, "refresh": 3}], ids=str)
def test_a_model_steps_through_a_selection_as_the_ordinary_way(dtype, batch, more, monkeypatch):
    model = tiny_model(head_dim=16, dtype=dtype)
    config = config_for(model, ["RSRS", "SSRR", "RRRR"], sink=4, recent=9, decode={"retrieval": {**FEW, **more}})
    patch_model(model, config)
    ids = torch.randint(3, 97, (batch, 90))
    taken, real = [], LongCtxLayer.take_step

    def counted(self, *given):
        taken.append(real(self, *given))
        return taken[-1]

    found = []
    for take_step in (counted, lambda *given: None):
        monkeypatch.setattr(LongCtxLayer, "take_step", take_step)
        cache = LongCtxCache(model)
        with torch.no_grad():
            parts = [model(ids[:, :45], **{CACHE: cache}).logits]
            parts += [model(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(45, 90)]
        found.append((torch.cat(parts, 1), report(model)))
    (got, one), (want, other) = found
    assert sum(kv is not None for kv in taken) > 100, "buffers grow in a few of the 135 steps"
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)
    assert one.chosen > 0 and (other.chosen, other.reused) == (2 * one.chosen, 2 * one.reused)
    assert 0.2 < one.read < 0.9 and other.read == pytest.approx(one.read)
