"""``select: page_bounds``: the bound really bounds, and what is read is what the rule says."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.config_cases import refused
from helpers.select_cases import go_on, prompted, selecting
from helpers.tiny import left_padded

from hf_longctx import report
from hf_longctx.decode import _votes
from hf_longctx.decode._selection import Selection
from hf_longctx.decode.base import Chosen
from hf_longctx.decode.page_bounds import PageBounds
from hf_longctx.kernels import base as kernels
from hf_longctx.kernels.reference import page_scores
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.segments import Segment

SMALL = {"sink": 4, "recent": 9, "min_tokens": 0, "dense_layers": 0}


def cached(tokens, batch=2, heads=2, dim=8, dtype=torch.float64):
    k = torch.randn(batch, heads, tokens, dim, dtype=dtype)
    return [Segment(k, k, tokens)], k


def entries(chosen, position, row=0, head=0) -> list[int]:
    blocks = chosen.blocks(position)
    return blocks.indices[row, head, 0, : blocks.counts[row, head, 0]].tolist()


def scored(spec, q, segments, pages, scale=1.0):
    index = spec.new_index()
    index.extend(segments, pages * spec.page)
    assert index.tokens == pages * spec.page
    return spec.scores(q, index, segments, 0, pages, scale)


@pytest.mark.quick
@pytest.mark.parametrize("sub", [1, 2, 4])
@pytest.mark.parametrize("group", [1, 3])
def test_a_score_is_the_most_of_all_corners(sub, group):
    segments, k = cached(16, dim=4)
    q = torch.randn(2, 2 * group, 1, 4, dtype=torch.float64)
    found = scored(PageBounds(page=4, sub=sub), q, segments, 4, 0.3)
    for row, head, page in itertools.product(range(2), range(2 * group), range(4)):
        most = []
        for part in k[row, head // group, 4 * page : 4 * page + 4].split(4 // sub):
            corners = itertools.product(*zip(part.amin(0).tolist(), part.amax(0).tolist(), strict=True))
            most.append((torch.tensor(list(corners), dtype=torch.float64) @ q[row, head, 0]).max() * 0.3)
        assert found[row, head, page] == pytest.approx(max(most).item(), abs=1e-12)


HARD = {
    "normal": lambda x: x,
    "one large channel": lambda x: x * torch.tensor([1e4, *[1.0] * 7], dtype=x.dtype),
    "all negative": lambda x: -x.abs(),
    "zeros": lambda x: x * (x > 0),
    "constant": lambda x: torch.ones_like(x),
    "one outlier": lambda x: x.index_fill(-2, torch.tensor([x.shape[-2] - 1]), 99.0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("page", [1, 3, 16])
def test_no_key_of_a_page_has_a_higher_score(page, name, dtype):
    for seed in range(5):
        torch.manual_seed(seed)
        k = HARD[name](torch.randn(2, 2, 4 * page, 8, dtype=torch.float64)).to(dtype)
        q = HARD[name](torch.randn(2, 4, 1, 8, dtype=torch.float64)).to(dtype)
        bound = scored(PageBounds(page=page), q, [Segment(k, k, 4 * page)], 4)
        assert bound.dtype == torch.promote_types(dtype, torch.float32)
        true = (q.double()[:, :, 0].unflatten(1, (2, 2)) @ k.double().mT).flatten(1, 2).unflatten(2, (4, page)).amax(3)
        room = (1e-12 if dtype == torch.float64 else 1e-5) * true.abs().max()  # of sums in another order
        assert (bound.double() >= true - room).all()
        finer = scored(PageBounds(page=page, sub=page), q, [Segment(k, k, 4 * page)], 4)
        torch.testing.assert_close(finer.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.quick
def test_pages_of_one_token_are_the_exact_best():
    spec = PageBounds(page=1, budget=7, **SMALL)
    segments, k = cached(60)
    q = torch.randn(2, 4, 1, 8, dtype=torch.float64)
    chosen = spec.choose(q, spec.new_index(), segments, 59, 0.3)
    true = (q[:, :, 0].unflatten(1, (2, 2)) @ k.mT).amax(2)
    for row, head in itertools.product(range(2), range(2)):
        best = true[row, head, 4:51].topk(7).indices + 4
        assert entries(chosen, 59, row, head) == [*range(4), *sorted(best.tolist()), *range(51, 60)]
    assert chosen.counted(59)[0] == 2 * 2 * (4 + 7 + 9)


@pytest.mark.parametrize("position", [40, 47, 48, 63, 64])
@pytest.mark.parametrize("page", [1, 4, 16])
@pytest.mark.parametrize("more", [{}, {"mass": 0.5}, {"share": 0.3}])
def test_the_first_and_the_newest_tokens_are_read_and_nothing_twice(page, position, more):
    spec = PageBounds(**{"page": page, "budget": page, **SMALL, **more})
    segments, _ = cached(position + 1)
    q = torch.randn(2, 4, 1, 8, dtype=torch.float64)
    if not spec.runs(position + 1):
        assert position + 1 - 4 - 9 < 2 * page + page * spec.width(position + 1)
        return
    chosen = spec.choose(q, spec.new_index(), segments, position, 1.0)
    for row, head in itertools.product(range(2), range(2)):
        listed = entries(chosen, position, row, head)
        assert listed == sorted(set(listed)) and listed[-1] == position // page
        read = {token for one in listed for token in range(one * page, min(position, one * page + page - 1) + 1)}
        assert read >= {*range(4), *range(position - 8, position + 1)}
        low, high = spec.between(position)
        middle = [one for one in listed if low <= one < high]
        assert 1 <= len(middle) <= spec.width(position + 1) and (
            more.get("mass") or len(middle) == chosen.entries.shape[2]
        )
    assert chosen.counted(position)[0] == int(chosen.blocks(position).visible(0, 1).sum())


def spied(monkeypatch):
    """(layer's selection, position, whether it was used again, the list) of every choice."""
    found = []
    choose = Selection.choose

    def spy(self, group, q, cached, position, scale):
        chosen, reused = choose(self, group, q, cached, position, scale)
        found.append((id(self), position, reused, entries(chosen, position)))
        return chosen, reused

    monkeypatch.setattr(Selection, "choose", spy)
    return found


def test_a_refresh_chooses_at_its_multiples_and_holds(monkeypatch):
    """Counted by the sequence's own tokens, whatever its pads; what is held still reads every new token."""
    found = spied(monkeypatch)
    model = selecting(PageBounds(page=4, budget=8, refresh=5, **SMALL), layers=1)
    ids, mask = left_padded([43, 40])
    mask = torch.cat([mask, torch.ones(2, 12, dtype=mask.dtype)], 1)
    go_on(model, prompted(model, ids, mask[:, :43]), torch.randint(3, 97, (2, 12)), mask)
    for first, rows in ((43, found[::2]), (40, found[1::2])):
        assert [position for _, position, _, _ in rows] == list(range(first, first + 12))
        chose = [position for _, position, reused, _ in rows if not reused]
        assert chose == [first, *range(first // 5 * 5 + 5, first + 12, 5)]
        for (_, _, _, before), (_, position, reused, after) in itertools.pairwise(rows):
            assert not reused or [*before, *range(before[-1] + 1, position // 4 + 1)] == after


@pytest.mark.parametrize(("similar", "times"), [(1.0, 12), (-1.0, 3)])
def test_a_choice_is_used_again_while_queries_are_alike(similar, times, monkeypatch):
    found = spied(monkeypatch)
    model = selecting(PageBounds(page=4, budget=8, refresh=6, similar=similar, **SMALL), layers=1)
    ids = torch.randint(3, 97, (1, 40))
    go_on(model, prompted(model, ids), torch.randint(3, 97, (1, 12)))
    assert [reused for _, _, reused, _ in found].count(False) == times


def test_drafts_are_each_chosen_for(monkeypatch):
    found = spied(monkeypatch)
    model = selecting(PageBounds(page=4, budget=8, **SMALL), layers=1)
    ids, steps = torch.randint(3, 97, (1, 40)), torch.randint(3, 97, (1, 6))
    one = go_on(model, prompted(model, ids), steps)
    singles, found[:] = [row[1:] for row in found], []
    torch.testing.assert_close(go_on(model, prompted(model, ids), steps, step=6), one, rtol=0, atol=1e-9)
    assert [row[1:] for row in found] == singles and [position for position, *_ in singles] == list(range(40, 46))


def test_below_min_tokens_and_in_the_first_layers_all_is_read(monkeypatch):
    found = spied(monkeypatch)
    fields = {"page": 4, "budget": 8, **SMALL, "min_tokens": 45, "dense_layers": 1}
    model = selecting(PageBounds(**fields), layers=3)
    ids, steps = torch.randint(3, 97, (1, 40)), torch.randint(3, 97, (1, 8))
    cache = prompted(model, ids)
    want = go_on(model, cache, steps)
    assert [position for _, position, _, _ in found] == [44, 44, 45, 45, 46, 46, 47, 47]
    assert len({one for one, *_ in found}) == 2 and [len(list(layer.chosen)) for layer in cache.own] == [0, 1, 1]
    found.clear()
    got = go_on(model, prompted(model, ids), steps, step=8)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    assert len(found) == 8, "the drafts on this side of the boundary read everything"


def test_a_short_budget_is_rounded_down_to_pages_but_for_the_last():
    assert PageBounds(page=16, budget=2048).width(9999) == 128
    assert PageBounds(page=16, budget=31).width(9999) == 1 == PageBounds(page=16, budget=3).width(9999)
    assert PageBounds(page=16, share=0.1).width(9999) == 62


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"page": 16, "sub": 3}, "sub: got 3, expected a number that divides page, 16"),
        ({"similar": 0.5}, "similar: got 0.5 with refresh 1"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(fields, said):
    refused(lambda: PageBounds(**fields), said)


def test_the_votes_of_a_group():
    scores = torch.randn(2, 6, 9, dtype=torch.float64)
    by_head = scores.view(2, 2, 3, 9)
    assert torch.equal(_votes.vote(scores, 2, "max"), by_head.max(2).values)
    assert torch.equal(_votes.vote(scores, 2, "mean"), by_head.mean(2))
    shares = by_head.softmax(3)
    torch.testing.assert_close(_votes.vote(scores, 2, "softmax").exp(), shares.sum(2))
    layer = _votes.vote(scores, 2, "layer")
    torch.testing.assert_close(layer.exp(), shares.sum((1, 2))[:, None].expand(-1, 2, -1))
    with pytest.raises(ValueError, match="got 'most', expected max, mean"):
        _votes.vote(scores, 2, "most")


def test_the_best_are_ascending_and_equal_votes_go_to_the_lowest():
    votes = torch.tensor([[[1.0, 3, 2, 3, 0, 3, 2]]])
    for width, want in (
        (1, [1]),
        (2, [1, 3]),
        (3, [1, 3, 5]),
        (4, [1, 2, 3, 5]),
        (7, list(range(7))),
        (99, list(range(7))),
    ):
        found, counts = _votes.best(votes, width)
        assert found.tolist() == [[want]] and counts is None and found.dtype == torch.int32


@pytest.mark.parametrize("mass", [0.01, 0.5, 0.9, 1.0])
def test_as_few_are_chosen_as_have_the_mass(mass):
    votes = 2 * torch.randn(2, 3, 20, dtype=torch.float64)
    found, counts = _votes.best(votes, 12, mass)
    shares = votes.softmax(2)
    for row, head in itertools.product(range(2), range(3)):
        ordered = shares[row, head].sort(descending=True)
        fewest = next((i + 1 for i in range(12) if ordered.values[: i + 1].sum() >= mass - 1e-12), 12)
        assert counts[row, head] == fewest
        assert found[row, head, :fewest].tolist() == sorted(ordered.indices[:fewest].tolist())


def test_the_list_of_a_choice():
    made = Chosen(4, 1, 6, torch.tensor([[[2, 4, 0], [3, 0, 0]]], dtype=torch.int32), torch.tensor([[2, 1]]))
    blocks = made.blocks(29)
    assert isinstance(blocks, BlockList) and (blocks.first, blocks.kv_len) == (29, 30)
    assert entries(made, 29) == [0, 2, 4, 6, 7] and entries(made, 29, head=1) == [0, 3, 6, 7]
    assert made.counted(29)[0] == int(blocks.visible(0, 1).sum()) == 2 * (4 + 6) + 3 * 4


def test_the_bounds_are_of_the_keys_at_hand():
    """In pieces, over several segments and after a rollback they are those of all keys at once."""
    _, k = cached(64)
    index = PageBounds(page=8).new_index()
    cut = [Segment(k[:, :, :20], k[:, :, :20], 20), Segment(k[:, :, 20:], k[:, :, 20:], 44)]
    for tokens, back in ((17, 9), (40, 33), (64, 64)):
        index.extend(cut, tokens)
        index.crop(back)
        assert index.tokens == back // 8 * 8
    pages = torch.cat(index.pages.views(), 2)
    want = k.unflatten(2, (8, 8))
    assert torch.equal(pages, torch.cat([want.amax(3), want.amin(3)], 3))
    q = torch.randn(2, 2, 1, 8, dtype=torch.float64)
    assert (page_scores(q, pages) >= (q @ k.mT)[:, :, 0].unflatten(2, (8, 8)).amax(3) - 1e-12).all()


def test_only_the_listed_tokens_are_gathered(monkeypatch):
    """The bytes that are read, not the time: of a store of pages and of plain memory."""
    widths = []
    attend_list = kernels._listed

    def spy(word, q, segments, reads, scores, forward):
        widths.append(int(reads.visible(0, 1).sum()))
        return attend_list(word, q, segments, reads, scores, forward)

    monkeypatch.setattr(kernels, "_listed", spy)
    model = selecting(PageBounds(page=8, budget=16, **SMALL), "offloaded", layers=1, roles="retrieval")
    ids = torch.randint(3, 97, (1, 400))
    go_on(model, prompted(model, ids), torch.randint(3, 97, (1, 3)))
    assert len(widths) == 3 and max(widths) <= 4 * (8 + 16 + 9 + 7)
    assert report(model).read == pytest.approx(sum(widths) / (4 * (401 + 402 + 403)))
