"""Short forms of `attend`, by what is read."""

from __future__ import annotations

from hf_longctx.layout.reads import ALL, CAUSAL, Window
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import Segment


def segment(k, v):
    return Segment(k, v, k.shape[2])


def decode(kernel, q, segments, scale):
    """Over every key of every segment."""
    return kernel.attend(q, segments, ALL, Scores(scale), want_lse=False)[0]


def causal(kernel, q, segments, scale):
    """The queries are the last tokens of the last segment."""
    return kernel.attend(q, segments, CAUSAL, Scores(scale), want_lse=False)[0]


def dense(kernel, q, k, v, scale):
    """The queries are the last tokens of k and v."""
    return causal(kernel, q, [segment(k, v)], scale)


def streaming(kernel, q, sink_k, sink_v, k, v, *, recent, first, scale):
    segments = [segment(sink_k, sink_v), segment(k, v)]
    return kernel.attend(q, segments, Window(recent, first), Scores(scale), want_lse=False)[0]


def sparse(kernel, q, k, v, blocks, scale):
    return kernel.attend(q, [segment(k, v)], blocks, Scores(scale), want_lse=False)[0]
