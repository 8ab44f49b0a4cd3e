"""What every kernel of the folder must give, by rules written here anew: out and lse of each kind of reads and scores.

A kernel that refuses a case says why; one that takes it is compared in the widest dtype it takes, with float64.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hf_longctx.kernels import base
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.reads import ALL, CAUSAL, Averaged, Window
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

    def truth(self, scores: Scores):
        """(out, lse) by the formula."""
        k, v = (x.repeat_interleave(self.group, 1) for x in (self.k, self.v))
        found = cap(self.q @ k.transpose(2, 3) * scores.scale, scores.softcap)
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
