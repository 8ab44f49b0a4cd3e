"""One attention layer that decodes with a selection, without a model; and attention over listed positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_longctx.cache.layer import LongCtxLayer
from hf_longctx.cache.plan import LayerPlan
from hf_longctx.decode.base import Chosen, Select
from hf_longctx.kernels import reference
from hf_longctx.layout.forward import DecodeCounts, Forward, ForwardLog
from hf_longctx.layout.rows import Rows
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import Segment
from hf_longctx.model.layer_call import LayerCall
from hf_longctx.stores.full import Full
from hf_longctx.stores.sink_recent import SinkRecent

SMALL = {"sink": 4, "recent": 8, "min_tokens": 0, "dense_layers": 0}
OUTSIDE = 12  # tokens of SMALL that every query reads
SCALE = 0.3

QKV = tuple[Tensor, Tensor, Tensor]


def tokens(length: int, batch: int = 1, heads: int = 4, kv_heads: int = 2, dim: int = 8) -> QKV:
    """Random q ``[B, H, S, D]``, k and v ``[B, n, S, D]``."""
    return tuple(torch.randn(batch, each, length, dim, dtype=torch.float64) for each in (heads, kv_heads, kv_heads))


def decoded(spec: Select, qkv: QKV, prompt: int, starts: tuple[int, ...] | None = None) -> tuple[Tensor, DecodeCounts]:
    """What each token after the ``prompt`` first ones reads, ``[B, H, S - prompt, D]``, one forward for each."""
    q, k, v = qkv
    stores = {"retrieval": Full(), "streaming": SinkRecent()}
    plan = LayerPlan.of(0, "R" * k.shape[1], stores, "reference", decode=spec)
    layer = LongCtxLayer(plan)
    log = ForwardLog()
    outs = []
    for low, high in [(0, prompt), *((at, at + 1) for at in range(prompt, q.shape[2]))]:
        forward = Forward(Rows(q.shape[0], low, high - low, starts), log)
        kept = layer.update(k[:, :, low:high], v[:, :, low:high], forward)
        if low:
            outs.append(LayerCall(plan, forward, Scores(SCALE)).cached(q[:, :, low:high], kept.parts))
    return torch.cat(outs, 2), log.decode


def over(qkv: QKV, prompt: int, read: Sequence[Sequence[set[int]]]) -> Tensor:
    """Attention of the tokens after the prompt over the positions ``read[token][KV head]``, ``[1, H, T, D]``."""
    q, k, v = qkv
    visible = torch.zeros(1, k.shape[1], q.shape[2] - prompt, k.shape[2], dtype=torch.bool)
    for token, by_head in enumerate(read):
        for head, positions in enumerate(by_head):
            visible[0, head, token, sorted(positions)] = True
    visible = visible.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return reference.attention(q[:, :, prompt:], k, v, visible, SCALE)[0]


def dense(qkv: QKV, prompt: int) -> Tensor:
    """Attention of the tokens after the prompt over all tokens."""
    every = [[set(range(at + 1))] * qkv[1].shape[1] for at in range(prompt, qkv[0].shape[2])]
    return over(qkv, prompt, every)


def top(scores: Sequence[float], count: int, first: int) -> set[int]:
    """The positions of the ``count`` largest, of which the lowest is ``first``; equal ones from the lowest."""
    order = sorted(range(len(scores)), key=lambda at: (-scores[at], at))
    return {at + first for at in order[:count]}


def outside(spec: Select, position: int, high: int) -> set[int]:
    """What is read beside what is chosen, where everything from ``high`` on is."""
    return set(range(spec.sink)) | set(range(high, position + 1))


def choose(spec: Select, q: Tensor, k: Tensor) -> Chosen:
    """What one query ``[B, H, 1, D]`` chooses; it stands at the last of the keys."""
    segments = [Segment(k, k, k.shape[2])]
    return spec.choose(q, spec.new_index(), segments, k.shape[2] - 1, SCALE)


def assert_same(out: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(out, right, rtol=0, atol=1e-12)


def assert_rows_as_alone(spec: Select, starts: tuple[int, ...], prompt: int, length: int) -> None:
    """A batch padded on the left is decoded as each of its sequences alone."""
    qkv = tokens(length, batch=len(starts))
    padded, counts = decoded(spec, qkv, prompt, starts)
    alone = 0
    for row, start in enumerate(starts):
        own = tuple(x[row : row + 1, :, start:] for x in qkv)
        out, more = decoded(spec, own, prompt - start)
        assert_same(padded[row : row + 1], out)
        alone += more.chosen
    assert counts.chosen == alone > 0
