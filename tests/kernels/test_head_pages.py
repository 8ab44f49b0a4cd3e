"""Keys in pages of one KV head each: the native kernel, and others block by block, by a loop in float64.

All memory beside the tokens is NaN, so what reads there is seen.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.native_builds import BUILDS, other_build  # noqa: F401 - a fixture
from helpers.ragged_cases import SCALE, randoms, same, scores_of

from hf_longctx.errors import UnsupportedModeError
from hf_longctx.kernels import base, native, reference
from hf_longctx.layout import head_pages as layout
from hf_longctx.layout.forward import Forward
from hf_longctx.layout.head_pages import KIND, HeadPages
from hf_longctx.layout.reads import ALL, All, BlockList, Causal, Window
from hf_longctx.layout.rows import Rows
from hf_longctx.layout.scores import Scores

ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}
# (tokens of a page, tokens of each sequence): the edges of pages, of tiles (64 keys) and of items (512).
CASES = {
    "page 1": (1, [1, 3]),
    "page 5": (5, [1, 4, 5, 6, 63]),
    "page 64": (64, [63, 64, 65, 513]),
    "page 160": (160, [320, 511, 700]),
    "page 600": (600, [599, 601, 1]),
}

pytestmark = pytest.mark.usefixtures("native_on")


def head_pages(page, lengths, kv_heads=3, dim=16, dtype=torch.float32) -> HeadPages:
    """Blocks in any order in a pool of NaN: of each a page of keys and one of values of every KV head, and a rest."""
    width = max(-(-length // page) for length in lengths)
    block = 2 * page * kv_heads + 3
    order = torch.randperm(len(lengths) * width, generator=torch.Generator().manual_seed(page))
    pages = (order * block).view(len(lengths), width)
    flat = torch.full((len(order) * block, dim), math.nan, dtype=dtype)
    made = HeadPages(flat, flat[page:], pages, 2 * page * torch.arange(kv_heads), torch.tensor(lengths), page)
    for row, length in enumerate(lengths):
        for n in range(kv_heads):
            for x, seed in ((made.k, 0), (made.v, 1)):
                x[rows_of(made, row, n)] = randoms(length, dim, seed=9 * row + 2 * n + seed).to(dtype)
    return made


def rows_of(made: HeadPages, row: int, n: int):
    tokens = torch.arange(int(made.lengths[row]))
    return made.pages[row, tokens // made.page] + made.heads[n] + tokens % made.page


def truth(q, made: HeadPages, scores: Scores):
    """(out, lse): every sequence and KV head by itself."""
    group = q.shape[1] // len(made.heads)
    outs, sums = [], []
    for row in range(len(q)):
        for n in range(len(made.heads)):
            k, v = (x[rows_of(made, row, n)].double()[None, None] for x in (made.k, made.v))
            bias = None
            if scores.first_bias is not None:
                bias = torch.zeros(1, group, 1, k.shape[2], dtype=torch.float64)
                bias[0, :, 0, 0] = scores.first_bias[n * group : (n + 1) * group]
            own = q[row : row + 1, n * group : (n + 1) * group].double()
            out, lse = reference.attention(own, k, v, None, scores.scale, bias, scores.softcap)
            outs.append(out)
            sums.append(lse)
    shape = (len(q), -1, *outs[0].shape[2:])
    return torch.cat(outs, 1).view(shape), torch.cat(sums, 1).view(len(q), -1, 1)


def query(made: HeadPages, group: int):
    return randoms(len(made.lengths), group * len(made.heads), 1, made.k.shape[1], seed=4).to(made.dtype)


def forward_of(q):
    return Forward(Rows(len(q), 0, 1))


@pytest.mark.parametrize("name", ["plain", "softcap", "first", "first softcap"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", ALLOWED)
def test_out_and_lse_are_those_of_a_loop(dtype, case, name, monkeypatch):
    monkeypatch.setattr(layout, "BLOCK", 200)
    for group, kv_heads, dim in ((1, 3, 16), (4, 1, 64), (3, 2, 80)):
        made = head_pages(*case, kv_heads, dim, dtype)
        q = query(made, group)
        scores = scores_of(name, q.shape[1])
        want = truth(q, made, scores)
        forward = forward_of(q)
        got = base.attend("auto", q, [made], ALL, scores, forward, want_lse=True)
        assert got[0].dtype == dtype and same(got, want, ALLOWED[dtype])
        blocks = base._streamed("auto", q, [made], ALL, scores, forward_of(q))
        assert same(blocks, want, ALLOWED[dtype])
        ours = dtype != torch.float64
        assert forward.log.used == ({"native"} if ours else {"cpu", base.STREAMED})
        bare = base.attend("auto", q, [made], ALL, scores, forward)[0]
        assert same((bare, want[1]), want, ALLOWED[dtype])
        check_controls(got, q, made, scores, ALLOWED[dtype])


def check_controls(got, q, made, scores, allowed):
    """Other lengths, pages, heads and numbers give another answer."""
    assert not same(got, truth(q, made, replace(scores, scale=0.5)), allowed) or int(made.lengths.max()) == 1
    if int(made.lengths.min()) > 1 and allowed < 0.01:  # one token of hundreds is less than bfloat16 rounds
        assert not same(got, truth(q, replace(made, lengths=made.lengths - 1), scores), allowed)
    assert not same(got, truth(q, replace(made, pages=made.pages.roll(1, 0)), scores), allowed)
    if len(made.heads) > 1:
        assert not same(got, truth(q, replace(made, heads=made.heads.roll(1)), scores), allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", range(1, 9))
def test_native_decodes_groups_of_every_size(group, dtype):
    for nth, case in enumerate(CASES.values()):
        made = head_pages(*case, 2, (64, 128, 80, 256, 16)[(nth + group) % 5], dtype)
        q = query(made, group)
        assert same(native.attend(q, [made], ALL, Scores(0.1)), truth(q, made, Scores(0.1)), ALLOWED[dtype])


@pytest.mark.parametrize("other_build", BUILDS, indirect=True)
@pytest.mark.usefixtures("other_build")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_other_cpus(dtype):
    for case in CASES.values():
        made = head_pages(*case, dtype=dtype)
        q = query(made, 3)
        scores = scores_of("first softcap", q.shape[1])
        assert same(native.attend(q, [made], ALL, scores), truth(q, made, scores), ALLOWED[dtype])


def test_threads_do_not_change_the_answer():
    made = head_pages(256, [5000, 17, 900])
    q = query(made, 4)
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outs.append(native.attend(q, [made], ALL, Scores(SCALE)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in outs[1:] for x, y in zip(outs[0], other, strict=True))


@pytest.mark.parametrize("way", ["as they are", "block by block"])
def test_memory_beside_the_tokens_would_be_seen(way):
    """A control of all tests here."""
    made = head_pages(5, [4, 9])
    q = query(made, 2)
    longer = replace(made, lengths=torch.tensor([5, 9]))
    attend = native.attend if way == "as they are" else lambda *given: base._streamed("cpu", *given, forward_of(q))
    out, _ = attend(q, [longer], ALL, Scores(SCALE))
    assert out[0].isnan().all() and out[1].isfinite().all()


def test_what_kernels_say_of_them():
    case = base.Case(torch.device("cpu"), torch.float32, 64, reads=All, one_query=True, kinds=frozenset({KIND}))
    for name, module, _ in base._candidates(base.names()):
        assert (module.supports(case) is None) == (name == "native"), name
        others = [case._replace(device=torch.device("cuda")), case._replace(one_query=False)]
        others += [case._replace(reads=kind) for kind in (Window, BlockList)]
        others.append(case._replace(kinds=frozenset({KIND, "ragged"})))
        for other in others:
            reason = module.supports(other)
            assert isinstance(reason, str) and len(reason) > 10
    assert native.supports(case._replace(reads=Causal)) is None


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        ({"lengths": torch.tensor([4, 11])}, "beyond the rows"),  # of pages that it does not have
        ({"lengths": torch.tensor([-1, 9])}, "beyond the rows"),
        ({"pages": torch.tensor([[0, 0], [0, 1 << 40]])}, "beyond the rows"),
        ({"pages": torch.tensor([[-1, 0], [0, 0]])}, "beyond the rows"),
        ({"heads": torch.tensor([0, -10, 20])}, "beyond the rows"),
        ({"heads": torch.tensor([0, 10, 1 << 40])}, "beyond the rows"),
        ({"pages": torch.zeros(3, 2, dtype=torch.int64)}, "for 2 sequences"),
        ({"lengths": torch.tensor([4, 9], dtype=torch.int32)}, "for 2 sequences"),
        ({"heads": torch.arange(4)}, "4 KV heads for 6 query heads"),
        ({"page": 0}, "pages of 0 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(edit, match):
    made = head_pages(5, [4, 9])
    q = query(made, 2)
    with pytest.raises(ValueError, match=match):
        native.attend(q, [replace(made, **edit)], ALL, Scores(SCALE))


def test_the_last_page_may_end_where_the_rows_end():
    made = head_pages(5, [4, 9], kv_heads=1)
    last = int(made.pages.max()) + made.page
    q = query(made, 2)
    whole = native.attend(q, [made], ALL, Scores(SCALE))
    short = replace(made, k=made.k[: last + made.page], v=made.v[: last + made.page])
    assert same(native.attend(q, [short], ALL, Scores(SCALE)), whole, 0)
    with pytest.raises(ValueError, match="beyond the rows"):
        row = int(made.pages[1, 1])
        native.attend(
            q[1:],
            [replace(made, k=made.k[: row + 3], pages=made.pages[1:], lengths=made.lengths[1:])],
            ALL,
            Scores(1.0),
        )


def test_gradients_and_strange_strides_are_left_to_cpu():
    made = head_pages(5, [4, 9])
    q = query(made, 2)
    want = truth(q, made, Scores(SCALE))
    turned = replace(made, k=made.k.T.contiguous().T)
    assert same(native.attend(q, [turned], ALL, Scores(SCALE)), want, 1e-5)
    assert native.attend(q.requires_grad_(), [made], ALL, Scores(SCALE))[0].requires_grad


def test_nothing_gets_them_in_one_piece():
    with pytest.raises(UnsupportedModeError, match="several requests"):
        head_pages(5, [4, 9]).joined_note  # noqa: B018
