"""What every kernel of the folder must give, by rules written here anew: out and lse of each kind of reads and scores.

A kernel that refuses a case says why; one that takes it is compared in the widest dtype it takes, with float64.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from hf_longctx.kernels import base
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.forward import Forward
from hf_longctx.layout.reads import ALL, CAUSAL, Averaged, Window
from hf_longctx.layout.rows import Rows
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import Segment

MODULES = {name: module for name, module, _ in base._candidates(base.names()) if module is not None}
# A kernel that `auto` never takes may compile for a minute.
WORDS = [pytest.param(name, marks=[pytest.mark.slow] * (MODULES[name].PREFERENCE < 0)) for name in sorted(MODULES)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
DIM, SCALE, BLOCK = 16, 0.4, 64
SINK, RECENT = 3, 20
SIZES = [(1, 0), (1, 62), (1, 64), (63, 0), (63, 70), (64, 1), (65, 0), (65, 63), (9, 119)]  # queries, tokens before
GROUPS = (1, 4, 7)
KINDS = ("all", "causal", "window", "averaged", "list", "list by head")
CPU = torch.device("cpu")


def randoms(*shape, seed=0):
    make = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=make, dtype=torch.float64)


def in_nan(x, dtype):
    """A view of every second slot of a longer buffer that is NaN elsewhere, heads after tokens."""
    buffer = torch.full((x.shape[0], 2 * x.shape[2] + 3, x.shape[1], x.shape[3]), math.nan, dtype=dtype)
    view = buffer.transpose(1, 2)[:, :, : 2 * x.shape[2] : 2]
    return view.copy_(x)


class Call:
    """One call: what a kernel is given, and what it must give, ``visible [B, H, T, S]`` being the rule."""

    def __init__(self, kind, new, past, group, cuts=(), batch=2, kv_heads=2):
        self.kind, self.new, self.past, self.total = kind, new, past, new + past
        self.q = randoms(batch, kv_heads * group, new, DIM)
        self.k, self.v = (
            randoms(batch, kv_heads, self.total, DIM, seed=1),
            randoms(batch, kv_heads, self.total, DIM, seed=2),
        )
        self.heads, self.group, self.batch = kv_heads * group, group, batch
        self.visible = torch.ones(batch, self.heads, new, self.total, dtype=torch.bool)
        self.means = None
        i = torch.arange(past, self.total)[:, None]
        j = torch.arange(self.total)
        if kind != "all":
            self.visible &= j <= i
        if kind == "window":
            self.visible &= (j < SINK) | (i - j < RECENT)
            first = min(SINK, self.total)
            dropped = max(0, past - RECENT + 1 - SINK)
            self.reads, self.bounds = Window(RECENT, first + dropped), [(0, first), (first + dropped, self.total)]
        elif kind == "averaged":
            self._average(past, i, j)
        elif kind.startswith("list"):
            self._list(group if kind == "list by head" else 1, kv_heads)
        else:
            self.reads = CAUSAL if kind == "causal" else ALL
        if not hasattr(self, "bounds"):
            self.bounds = list(zip([0, *cuts], [*cuts, self.total], strict=True))

    def _average(self, past, i, j):
        def edge(position):
            return max(SINK, position + 1 - RECENT - position // 7)

        edges = torch.tensor([edge(position) for position in range(past, self.total)])
        self.visible &= (j < SINK) | (j >= edges[:, None])
        sink, first = min(SINK, self.total), max(SINK, edge(past - 1)) if past else SINK
        sums = [x[:, :, sink:first].sum(2, keepdim=True) for x in (self.k, self.v)] if first > SINK else None
        self.reads = Averaged(SINK, first, self.total, edge, edges, sums and tuple(sums))
        self.bounds = [(0, sink), (min(first, self.total), self.total)]
        between = ((j >= SINK) & (j < edges[:, None])).double()
        self.counts = between.sum(-1)
        weights = between / self.counts.clamp(min=1)[:, None]
        self.means = [(weights @ x).repeat_interleave(self.group, 1) for x in (self.k, self.v)]

    def _list(self, per_head, kv_heads):
        first, lists = self.past // BLOCK, kv_heads * per_head
        make = torch.Generator().manual_seed(self.total)
        own = -(-self.total // BLOCK)
        blocks = torch.rand(self.batch, lists, own - first, own, generator=make) < 0.5
        blocks[0, 0, :, 0], blocks[-1, -1] = True, False  # the last one reads by columns alone
        columns = torch.rand(self.batch, lists, self.total, generator=make) < 0.2
        columns[..., 0] |= torch.rand(self.batch, lists, generator=make) < 0.5
        self.reads = BlockList.from_mask(blocks, columns, block=BLOCK, first=self.past, kv_len=self.total)
        for b in range(self.batch):
            for h in range(self.heads):
                nth = h * lists // self.heads
                for t in range(self.new):
                    q_block = (self.past + t) // BLOCK
                    listed = blocks[b, nth, q_block - first].repeat_interleave(BLOCK)[: self.total]
                    before = torch.arange(self.total) < q_block * BLOCK
                    self.visible[b, h, t] &= listed | (columns[b, nth] & before)

    def given(self, dtype):
        """q and the segments in ``dtype``."""
        q = in_nan(self.q, dtype)
        segments = [
            Segment(in_nan(self.k[:, :, a:b], dtype), in_nan(self.v[:, :, a:b], dtype), b - a) for a, b in self.bounds
        ]
        return q, segments

    def rounded(self, dtype):
        """The same call with what ``dtype`` makes of q, k and v."""
        other = object.__new__(Call)
        other.__dict__.update(self.__dict__)
        other.q, other.k, other.v = (x.to(dtype).double() for x in (self.q, self.k, self.v))
        return other

    def truth(self, scores: Scores, bias=0):
        """(out, lse) by the formula; ``bias`` is added to the capped scores."""
        k, v = (x.repeat_interleave(self.group, 1) for x in (self.k, self.v))
        found = cap(self.q @ k.transpose(2, 3) * scores.scale, scores.softcap) + bias
        if scores.first_bias is not None:
            found[..., 0] += scores.first_bias[:, None]
        found = found.masked_fill(~self.visible, -math.inf)
        if self.means is not None:
            mean_k, mean_v = self.means
            mean = (
                cap((self.q * mean_k).sum(-1, keepdim=True) * scores.scale, scores.softcap) + self.counts.log()[:, None]
            )
            found = torch.cat([found, mean], -1)
        if scores.sinks is not None:
            found = torch.cat([found, scores.sinks[:, None, None].expand(*found.shape[:3], 1)], -1)
        weights = found.softmax(-1).nan_to_num(0)
        out = weights[..., : self.total] @ v
        if self.means is not None:
            out = out + weights[..., self.total, None] * mean_v
        return out, found.logsumexp(-1)


def cap(x, softcap):
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def scores_of(name, heads) -> Scores:
    softcap = 1.5 if "softcap" in name else None
    bias = randoms(heads, seed=5) if "first" in name else None
    sinks = randoms(heads, seed=6) if "sinks" in name else None
    return Scores(SCALE, softcap, sinks, bias)


def cast(scores, dtype):
    return replace(scores, **{
        name: x.to(dtype) for name in ("sinks", "first_bias") if (x := getattr(scores, name)) is not None
    })  # fmt: skip


def taken(word, call, scores):
    """The widest dtype in which the kernel takes the call; None, if it says why it takes none."""
    if type(call.reads) not in MODULES[word].READS:
        return None
    for dtype in DTYPES:
        case = base.case_of(*call.given(dtype), call.reads, scores)
        reason = MODULES[word].supports(case)
        if reason is None:
            return dtype
        assert isinstance(reason, str) and len(reason) > 10
    return None


def tolerance(dtype) -> float:
    return {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]


def same(got, want, allowed) -> bool:
    (out, lse), (want_out, want_lse) = got, want
    empty = want_lse == -math.inf
    if not torch.equal(lse == -math.inf, empty):
        return False
    error = (out.double() - want_out).abs().max()
    return bool(error <= allowed and (lse.double() - want_lse).masked_fill(empty, 0).abs().max() <= allowed)


def check(word, call, scores):
    """Out and lse by the rule, the same without lse, and other numbers are seen to be wrong."""
    dtype = taken(word, call, scores)
    if dtype is None:
        return None
    q, segments = call.given(dtype)
    own, scores = call.rounded(dtype), scores
    allowed = tolerance(dtype)
    got = MODULES[word].attend(
        q, segments, call.reads, cast(scores, torch.float32 if dtype == torch.bfloat16 else dtype)
    )
    assert got[0].dtype == dtype and got[0].shape == q.shape
    assert got[1].dtype in (torch.float32, torch.float64) and got[1].shape == q.shape[:3]
    assert same(got, own.truth(scores), allowed)
    bare, _ = MODULES[word].attend(q, segments, call.reads, cast(scores, q.dtype), want_lse=False)
    assert (bare.double() - own.truth(scores)[0]).abs().max() <= allowed
    return got, own, allowed


@pytest.mark.spanning(("word", "kind"))  # no kernel has all kinds
@pytest.mark.parametrize("name", ["plain", "softcap", "first", "softcap first"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", WORDS)
def test_out_and_lse_are_those_of_the_rule(word, kind, name):
    for nth, (new, past) in enumerate(SIZES):
        cuts = [(), (past,), (0, past // 2, past)][nth % 3]
        call = Call(kind, new, past, GROUPS[nth % 3], cuts)
        scores = scores_of(name, call.heads)
        found = check(word, call, scores)
        if found is None:
            assert word != "reference"
            continue
        got, own, allowed = found
        other = replace(scores, scale=1.1 * SCALE)
        assert call.total == 1 or not same(got, own.truth(other), allowed)
        if scores.softcap:
            assert not same(got, own.truth(replace(scores, softcap=1.4)), allowed)
        if scores.first_bias is not None and call.visible[..., 0].any():
            assert not same(got, own.truth(replace(scores, first_bias=None)), allowed)


@pytest.mark.parametrize("kind", ["all", "causal"])
@pytest.mark.parametrize("word", WORDS)
def test_lengths_by_sequence_and_biases(word, kind):
    """The slots past a sequence's length are NaN; one sequence has no token in the last segment."""
    for new, group in ((1, 4), (9, 7), (30, 1)):
        call = Call(kind, new, 40, group, (13,))
        lengths = torch.tensor([call.total - 13, new - 1 if kind == "causal" else 0])
        scores = scores_of("softcap first", call.heads)
        dtype = taken(word, call, scores)
        if dtype is None:
            continue
        q, (past, last) = call.given(dtype)
        last.length = lengths
        last.bias, past.bias = randoms(2, 2, 1, call.total - 13, seed=3).float(), randoms(1, 1, 1, 13, seed=4).float()
        for x in (last.k, last.v):
            x[1, :, int(lengths[1]) :] = math.nan
        own = call.rounded(dtype)
        slots = torch.arange(call.total) - 13
        end = lengths[:, None, None, None]
        inside = slots < end
        if kind == "causal":
            inside = slots <= end - new + torch.arange(new)[:, None]
        own.visible = (inside | (slots < 0)).expand(2, call.heads, new, -1)
        added = torch.cat([past.bias.expand(2, 2, 1, 13), last.bias], 3).double().repeat_interleave(group, 1)
        given = cast(scores, torch.promote_types(dtype, torch.float32))
        got = MODULES[word].attend(q, [past, last], call.reads, given)
        assert same(got, own.truth(scores, added), tolerance(dtype))
        assert not same(got, own.truth(scores, added.roll(1, 3)), tolerance(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_sinks_are_a_logit_without_a_value(kind):
    """By the reference itself, and added by `base.attend` to what any kernel gives; a model's kernels in one place."""
    call = Call(kind, 9, 119, 4)
    scores = scores_of("softcap first sinks", call.heads)
    q, segments = call.given(torch.float64)
    want = call.truth(scores)
    for got in (
        MODULES["reference"].attend(q, segments, call.reads, scores),
        base.attend("auto", q, segments, call.reads, scores, Forward(Rows(2, 119, 9)), want_lse=True),
        (base.attend("auto", q, segments, call.reads, scores, Forward(Rows(2, 119, 9)))[0], want[1]),
    ):
        assert same(got, want, 1e-12)
        assert not same(got, call.truth(replace(scores, sinks=scores.sinks + 0.1)), 1e-3)
    for name, module in MODULES.items():
        if name != "reference" and module.supports(base.case_of(q, segments, call.reads, scores)) is None:
            with pytest.raises(ValueError, match="adds no sinks"):
                module.attend(q, segments, call.reads, scores)


def test_the_formulas_are_those_of_transformers():
    """Gemma 2's softcap and gpt-oss's sinks, by their own eager functions; Gemma's softmax is in float32."""
    call = Call("causal", 33, 40, 4)
    q, segments = call.given(torch.float64)
    mask = torch.zeros(33, 73, dtype=torch.float64).masked_fill(~call.visible[0, 0], -math.inf)[None, None]
    module = SimpleNamespace(num_key_value_groups=4, training=False, head_dim=DIM)
    eager = modeling_gemma2.eager_attention_forward
    want = eager(module, call.q, call.k, call.v, mask, scaling=SCALE, softcap=1.5)[0].transpose(1, 2)
    for word in ("reference", "auto"):
        scores = Scores(SCALE, softcap=1.5)
        got, _ = base.attend(word, q, segments, call.reads, scores, Forward(Rows(2, 40, 33)))
        assert (got - want).abs().max() < 1e-6
        plain, _ = base.attend(word, q, segments, call.reads, Scores(SCALE), Forward(Rows(2, 40, 33)))
        assert (plain - want).abs().max() > 1e-2
    sinks = randoms(call.heads, seed=6)
    module.sinks = sinks
    want = modeling_gpt_oss.eager_attention_forward(module, call.q, call.k, call.v, mask, scaling=SCALE)[0]
    for word in ("reference", "auto"):
        got, _ = base.attend(word, q, segments, call.reads, Scores(SCALE, sinks=sinks), Forward(Rows(2, 40, 33)))
        assert (got - want.transpose(1, 2)).abs().max() < 1e-12
        assert (plain - want.transpose(1, 2)).abs().max() > 1e-2


class Bytes(TorchDispatchMode):
    """The largest tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor) and not any(one is x for x in args):
                views = one._is_view() or one.untyped_storage().data_ptr() in self.known
                self.most = max(self.most, 0 if views else one.numel() * one.element_size())
        return out


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("word", [word.values[0] for word in WORDS if not word.marks])
def test_a_selection_of_decode_is_a_list_with_one_query_block(word, by_head):
    """All blocks are dense attention; some are read where they lie, over several segments, and no others copied."""
    heads, group, total = 2, 4, 4097
    call = Call("all", 1, total - 1, group, (1000, 1030))
    lists = heads * group if by_head else heads
    scores = Scores(SCALE)
    every = torch.ones(2, lists, 1, -(-total // 16), dtype=torch.bool)
    some = torch.rand(every.shape, generator=torch.Generator().manual_seed(0)) < 0.03
    some[..., 0], some[..., -1], some[..., 62] = True, True, True  # block 62 lies in two segments
    made = BlockList.from_mask(some, block=16, first=total - 1, kv_len=total)
    call.reads = made
    dtype = taken(word, call, scores)
    if dtype is None:
        assert word not in ("cpu", "native", "reference")
        return
    q, segments = call.given(dtype)
    module, dense = MODULES[word], BlockList.from_mask(every, block=16, first=total - 1, kv_len=total)
    allowed = tolerance(dtype)
    whole = module.attend(q, segments, ALL, scores)
    assert same(module.attend(q, segments, dense, scores), tuple(x.double() for x in whole), allowed)
    if word != "reference":
        with Bytes() as made_bytes:
            made_bytes.known = {x.untyped_storage().data_ptr() for one in segments for x in (one.k, one.v)}
            got = module.attend(q, segments, made, scores)
        assert 0 < made_bytes.most < segments[-1].k.nbytes / 2, "not even one of k and v is joined"
    else:
        got = module.attend(q, segments, made, scores)
    own = call.rounded(dtype)
    own.visible = made.visible().repeat_interleave(call.heads // lists, 1)
    assert same(got, own.truth(scores), allowed)
    assert not same(got, tuple(x.double() for x in whole), 100 * allowed)
