"""Keys of which each KV head keeps others: every kernel by a loop in float64, as they are or block by block.

All memory beside the parts is NaN, so what reads there is seen.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.native_builds import BUILDS, other_build  # noqa: F401 - a fixture
from helpers.packed_cases import numbers_of, packed
from helpers.ragged_cases import LENGTHS, SCALE, after, ragged, randoms, same, scores_of, truth

from hf_longctx.errors import UnsupportedModeError
from hf_longctx.kernels import base, cpu, native, reference
from hf_longctx.layout import ragged as layout
from hf_longctx.layout.forward import Forward
from hf_longctx.layout.ragged import KIND, Ragged
from hf_longctx.layout.reads import ALL, CAUSAL, All, Causal, Window
from hf_longctx.layout.rows import Rows
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import Segment

ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}
KERNELS = {"reference": (reference, torch.float64), "cpu": (cpu, torch.float64), "native": (native, torch.float32)}
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("native_on")


def call(lengths, group, new, dtype, dim=16, bias=False, behind=5):
    """(q, segments): ``behind`` tokens after the parts besides the new ones; None: no segment, for one query."""
    before = ragged(lengths, dim, dtype, bias)
    batch, kv_heads = before.lengths.shape
    q = randoms(batch, kv_heads * group, new, dim, seed=1).to(dtype)
    if behind is None:
        return q, [before]
    return q, [before, after(batch, kv_heads, behind + new - (new == 1), dim, dtype)]


def forward_of(q):
    return Forward(Rows(q.shape[0], 0, q.shape[2]))


def streamed(word, q, segments, reads, scores):
    """By blocks, whatever the kernel reads as it is."""
    return base._streamed(word, q, segments, reads, scores, forward_of(q))


@pytest.mark.spanning(("word", "name"))
@pytest.mark.parametrize("name", ["plain", "bias", "softcap bias", "first", "first bias softcap"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("word", KERNELS)
def test_out_and_lse_are_those_of_a_loop(word, lengths, name, monkeypatch):
    monkeypatch.setattr(layout, "BLOCK", 200)
    module, dtype = KERNELS[word]
    for group, new, behind in ((1, 1, 5), (4, 1, None), (3, 1, 0), (4, 9, 5), (7, 30, 0)):
        q, segments = call(lengths, group, new, dtype, bias="bias" in name, behind=behind)
        scores = scores_of(name, q.shape[1])
        assert module.supports(base.case_of(q, segments, CAUSAL, scores)) is None
        want = truth(q, segments, scores)
        reads = [CAUSAL, ALL] if new == 1 else [CAUSAL]
        for one in reads:
            got = module.attend(q, segments, one, scores)
            assert got[0].dtype == dtype and same(got, want, ALLOWED[dtype])
            bare, _ = module.attend(q, segments, one, scores, want_lse=False)
            assert same((bare, want[1]), want, ALLOWED[dtype])
            assert same(streamed(word, q, segments, one, scores), want, ALLOWED[dtype])
        check_controls(got, q, segments, scores, ALLOWED[dtype])


def check_controls(got, q, segments, scores, allowed):
    """Another scale, parts and bias give another answer."""
    before, *rest = segments
    assert not int(before.lengths.max()) or not same(got, truth(q, segments, replace(scores, scale=0.5)), allowed)
    if int(before.lengths.max()) > 2:
        less = replace(before, lengths=(before.lengths - 1).clamp(min=0))
        assert not same(got, truth(q, [less, *rest], scores), allowed)
        for name, x in (("k", before.k), ("v", before.v), ("score_bias", before.score_bias)):
            if x is not None:
                other = replace(before, **{name: x.roll(1, 0).nan_to_num(0)})
                assert not same(got, truth(q, [other, *rest], scores), allowed)
    held = (before.first_apart()[0].bias == 0).any() or before.score_bias is not None
    if scores.first_bias is not None and int(before.lengths.max()) and held:
        assert not same(got, truth(q, segments, replace(scores, first_bias=None)), allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", range(1, 9))
def test_native_decodes_groups_of_every_size(group, dtype):
    for nth, lengths in enumerate(LENGTHS.values()):
        dim = (64, 128, 80, 256, 16)[(nth + group) % 5]
        q, segments = call(lengths, group, 1, dtype, dim=dim, bias=group % 2 == 0)
        want = truth(q, segments, Scores(0.1))
        assert same(native.attend(q, segments, ALL, Scores(0.1)), want, ALLOWED[dtype])


@pytest.mark.parametrize("other_build", BUILDS, indirect=True)
@pytest.mark.usefixtures("other_build")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_other_cpus(dtype):
    for lengths in LENGTHS.values():
        q, segments = call(lengths, 3, 1, dtype, bias=True)
        scores = scores_of("softcap", q.shape[1])
        assert same(native.attend(q, segments, ALL, scores), truth(q, segments, scores), ALLOWED[dtype])


def test_native_reads_it_in_one_call(monkeypatch):
    q, segments = call(LENGTHS["edges"], 4, 1, torch.float32)
    ran, real = [], native._Call.run
    monkeypatch.setattr(native._Call, "run", lambda self, *given: ran.append(given[0]) or real(self, *given))
    monkeypatch.setattr(cpu, "attend", None)
    native.attend(q, segments, ALL, Scores(SCALE))
    assert ran == ["decode"]


def test_threads_do_not_change_the_answer():
    q, segments = call([[3000, 17, 900], [0, 5000, 64]], 4, 1, torch.float32)
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outs.append(native.attend(q, segments, ALL, Scores(SCALE)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in outs[1:] for x, y in zip(outs[0], other, strict=True))


@pytest.mark.parametrize("word", KERNELS)
def test_memory_beside_the_parts_would_be_seen(word):
    """A control of all tests here."""
    module, dtype = KERNELS[word]
    q, segments = call(LENGTHS["few"], 2, 1, dtype)
    longer = segments[0].lengths.clone()
    longer[1, 0] += 1
    segments[0] = replace(segments[0], lengths=longer)
    out, _ = module.attend(q, segments, ALL, Scores(SCALE))
    assert out[1, :2].isnan().all()
    assert out[0].isfinite().all() and out[1, 2:].isfinite().all()


@pytest.mark.parametrize("way", ["as it is", "block by block"])
@pytest.mark.parametrize("word", KERNELS)
def test_a_head_without_a_token_anywhere_gives_0(word, way):
    module, dtype = KERNELS[word]
    attend = module.attend if way == "as it is" else lambda *given: streamed(word, *given)
    for lengths in (LENGTHS["few"], LENGTHS["nothing"]):
        for behind in (0, None):
            q, segments = call(lengths, 2, 1, dtype, behind=behind)
            out, lse = attend(q, segments, ALL, Scores(SCALE))
            assert not out[0, :2].any() and (lse[0, :2] == -math.inf).all()
            assert lengths is LENGTHS["nothing"] or lse[1].isfinite().all()


@pytest.mark.parametrize("word", KERNELS)
def test_sequences_may_share_a_part(word):
    module, dtype = KERNELS[word]
    q, (before, behind) = call(LENGTHS["edges"], 2, 1, dtype)
    shared = replace(before, starts=before.starts[[1, 1]], lengths=before.lengths[[1, 1]])
    for new in (1, 4):
        asked = q.expand(-1, -1, new, -1)
        got = module.attend(asked, [shared, behind], CAUSAL, Scores(SCALE))
        assert same(got, truth(asked, [shared, behind], Scores(SCALE)), ALLOWED[dtype])
        apart = Ragged.of([[_part(shared, row, n) for n in range(2)] for row in range(2)])
        assert len(apart.k) == 2 * 1025 and torch.equal(
            got[0], module.attend(asked, [apart, behind], CAUSAL, Scores(SCALE))[0]
        )


def _part(made, row, n):
    own = made.of_head(row, n)
    return made.k[own], made.v[own], made.positions[own]


@pytest.mark.parametrize("word", KERNELS)
def test_the_bias_of_the_first_token_is_that_of_the_position_0(word):
    """Of a head that has it no more, nothing gets a bias: neither its first key, nor one behind."""
    module, dtype = KERNELS[word]
    lost = [(row, n) for row in range(2) for n in range(2)]
    for lengths in (LENGTHS["few"], LENGTHS["nothing"]):
        q, (before, behind) = call(lengths, 2, 1, dtype)
        without = [ragged(lengths, 16, dtype, lost=lost), behind]
        scores = scores_of("first", 4)
        plain = truth(q, without, Scores(SCALE))
        for attend in (module.attend, lambda *given: streamed(word, *given)):
            assert same(attend(q, without, ALL, scores), plain, ALLOWED[dtype])
            got = attend(q, [before, behind], ALL, scores)
            assert same(got, truth(q, [before, behind], scores), ALLOWED[dtype])
            assert lengths is LENGTHS["nothing"] or not same(got, plain, 100 * ALLOWED[dtype])


@pytest.mark.parametrize("new", [1, 7])
@pytest.mark.parametrize("name", ["plain", "first bias"])
def test_a_kernel_that_reads_plain_segments_alone_computes_it_block_by_block(new, name, monkeypatch):
    monkeypatch.setattr(cpu, "supports", lambda case: "reads plain segments alone" if case.kinds else None)
    monkeypatch.setattr(layout, "BLOCK", 100)
    q, segments = call(LENGTHS["edges"], 4, new, torch.float64, bias="bias" in name)
    asked, real = [], cpu.attend
    monkeypatch.setattr(cpu, "attend", lambda q, some, *rest: asked.append(some) or real(q, some, *rest))
    forward, scores = forward_of(q), scores_of(name, q.shape[1])
    got = base.attend("cpu", q, segments, CAUSAL, scores, forward, want_lse=True)
    assert same(got, truth(q, segments, scores), 1e-12)
    assert base.STREAMED in forward.log.used and None not in forward.log.notes
    assert all(isinstance(one, Segment) for some in asked for one in some)
    assert max(one.longest for some in asked for one in some) <= 100 and len(asked) > 6


@pytest.mark.parametrize("word", ["cpu", "native", "auto"])
def test_kernels_that_read_it_are_given_it(word):
    q, segments = call(LENGTHS["edges"], 4, 1, torch.float32)
    forward = forward_of(q)
    got = base.attend(word, q, segments, ALL, Scores(SCALE), forward, want_lse=True)
    assert forward.log.used == {"native" if word == "auto" else word}
    assert same(got, truth(q, segments, Scores(SCALE)), 1e-5)


def test_what_kernels_say_of_it():
    """Off the CPU all read blocks; on it, no window and no list of blocks is read from it."""
    case = base.Case(CPU, torch.float32, 64, reads=All, one_query=True, kinds=frozenset({KIND}))
    for name, module, _ in base._candidates(base.names()):
        assert (module.supports(case) is None) == (name in KERNELS), name
        off = case._replace(device=torch.device("cuda"))
        mixed = case._replace(kinds=frozenset({KIND, ("packed", 8, 64)}))
        for other in (off, mixed, case._replace(reads=Window)):
            reason = module.supports(other)
            assert isinstance(reason, str) and len(reason) > 10
        assert name not in KERNELS or module.supports(case._replace(reads=Causal, one_query=False)) is None
    q, segments = call(LENGTHS["few"], 2, 1, torch.float32)
    for module in (cpu, native):
        with pytest.raises(ValueError, match="segments without a bias"):
            module.attend(q, segments, Window(3, 0), Scores(SCALE))


def test_with_packed_ones_it_comes_block_by_block():
    shape = (2, 2, 4, 64)
    q, (before, behind) = call(LENGTHS["few"], 4, 1, torch.float32, dim=64)
    piece = packed(shape, 96, 8, 32, dtype=torch.float32)
    forward = forward_of(q)
    got = base.attend("auto", q, [before, piece, behind], ALL, Scores(SCALE), forward, want_lse=True)
    assert base.STREAMED in forward.log.used
    k, v, counts = numbers_of(piece)
    plain = Segment(k, v, 96)
    assert counts[..., :96].all() and same(got, truth(q, [before, plain, behind], Scores(SCALE)), 1e-4)
    assert not same(got, truth(q, [before, behind], Scores(SCALE)), 1e-2)


def test_a_gradient_is_left_to_a_kernel_that_has_it():
    for where in ("q", "cached"):
        q, (before, behind) = call(LENGTHS["few"], 2, 1, torch.float64)
        leaf = q if where == "q" else Ragged.of([[_part(before, row, n) for n in range(2)] for row in range(2)]).k
        grads = []
        for module in (cpu, reference):
            asked = leaf.clone().requires_grad_()
            segments = [before if where == "q" else replace(_alone(before), k=asked), behind]
            given = asked if where == "q" else q
            case = base.case_of(given, segments, ALL, Scores(SCALE))
            assert case.needs_grad and native.supports(case._replace(dtype=torch.float32)) == "computes no gradients"
            module.attend(given, segments, ALL, Scores(SCALE))[0].square().sum().backward()
            grads.append(asked.grad)
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
        assert grads[0].abs().max() > 1e-3
    q, (before, behind) = call(LENGTHS["few"], 2, 1, torch.float32)
    before = _alone(before)
    before.k.requires_grad_()
    assert native.attend(q, [before, behind], ALL, Scores(SCALE))[0].requires_grad


def _alone(made):
    return Ragged.of([[_part(made, row, n) for n in range(2)] for row in range(2)])


def test_keys_that_are_not_dense_are_left_to_cpu():
    q, (before, behind) = call(LENGTHS["few"], 2, 1, torch.float32)
    turned = replace(before, k=before.k.T.contiguous().T)
    got = native.attend(q, [turned, behind], ALL, Scores(SCALE))
    assert same(got, truth(q, [before, behind], Scores(SCALE)), 1e-5)


def test_nothing_gets_it_in_one_piece():
    with pytest.raises(UnsupportedModeError, match="no keys and values of one shape"):
        ragged(LENGTHS["few"], 16, torch.float32).contents()
