"""The dense tail as an explicit mask, written from the rule alone, and what recomputes attention by it."""

from __future__ import annotations

import torch

from helpers.tiny import DenseMask, Shadow
from hf_longctx.kernels import reference

FEWEST = 128  # real tokens a forward must bring to a sequence


def rule_positions(past: int, end: int, tail: int) -> torch.Tensor:
    """Row positions by which the queries ``past .. end - 1`` read, int64: their own, or in the tail the first one's."""
    positions = torch.arange(past, end)
    if end - past >= FEWEST:
        positions[max(0, end - past - tail) :] = past
    return positions


def reads(past: int, end: int, tail: int, sink: int, window) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one row: keys a query reads and keys that are gone, bool ``[end - past, end]``; ``window(i)`` in tokens."""
    i, j = torch.arange(past, end)[:, None], torch.arange(end)
    rule = rule_positions(past, end, tail)
    edge = rule - torch.tensor([window(int(p)) for p in rule], dtype=torch.long)
    gone = (j >= sink) & (j <= edge[:, None])
    return (j <= i) & ~gone, gone


def attention(q, k, v, sees, gone, scale) -> torch.Tensor:
    """``[H, T, D]`` of q ``[H, T, D]`` over k, v ``[H, S, D]``; ``gone``: keys whose mean is read, None for none."""
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~sees, float("-inf"))
    if gone is None:
        return scores.softmax(-1) @ v
    count = gone.sum(-1, keepdim=True)
    means = [gone.to(x.dtype) @ x / count.clamp(min=1) for x in (k, v)]
    score = (q * means[0]).sum(-1, keepdim=True) * scale + count.to(q.dtype).log()
    weights = torch.cat([scores, score], -1).softmax(-1)
    return weights[..., :-1] @ v + weights[..., -1:] * means[1]


class WatchTail(Shadow):
    """`Shadow` by the rule of the streaming store with its dense tail; ``tail`` in tokens, by the plan where None."""

    def __init__(self, monkeypatch, config, tail: int | None = None):
        super().__init__(monkeypatch, config)
        self.tail = config.prefill.streaming.dense_tail if tail is None else tail

    def check(self, module, q, kept, out, given: dict) -> None:
        k, v = self.keys[module.layer_idx]
        plan, rows, group = module.longctx_plan, kept.forward.rows, q.shape[1] // k.shape[1]
        store = self.config.stores.streaming
        for row in range(q.shape[0]):
            start, (new, end) = rows.start(row), rows.real(row)
            low = max(0, start - rows.past)
            for head, role in enumerate(plan.letters if new else ""):
                own = slice(head * group, (head + 1) * group)
                keys, values = (x[row, head, start : start + end].expand(group, -1, -1) for x in (k, v))
                streams = role == "S" and plan.window is None
                width = {"S": self.width(store), "R": lambda i: i + 1}[role]
                width = width if plan.window is None else lambda i: plan.window
                sink, tail = (store.sink, self.tail) if streams else (0, 0)
                sees, gone = reads(end - new, end, tail, sink, width)
                gone = gone if streams and hasattr(store, "edge") else None
                queries = q[row, own, low : low + new]
                want = attention(queries, keys, values, sees, gone, given["scaling"])
                got = out[row, low : low + new, own].transpose(0, 1)
                assert not torch.isnan(got).any()
                self.differ(module.layer_idx, got, want)
        self.calls += 1

    @staticmethod
    def width(store):
        if isinstance(store.recent, int):
            return lambda i: store.recent
        return lambda i: max(store.recent.min, int(store.recent.fraction * (i + 1)))


class TailMask(DenseMask):
    """A stock model with the rule of ``sink_recent`` and a dense tail as a mask, over Transformers' own caches."""

    def __init__(self, model, config, tail: int | None = None):
        super().__init__(model, config)
        self.tail = config.prefill.streaming.dense_tail if tail is None else tail

    def attend(self, module, q, k, v, mask, scaling=None, **kwargs):
        batch, heads, new, _ = q.shape
        total, group = k.shape[2], heads // k.shape[1]
        real = torch.ones(batch, total, dtype=torch.bool) if mask is None else mask.bool()
        visible = torch.zeros(batch, heads, new, total, dtype=torch.bool)
        for row, own in enumerate(real):
            slots = own.nonzero()[:, 0]
            start, end = int(slots[0]), len(slots)
            past = max(0, total - new - start)
            into, keys = slice(start + past - (total - new), start + end - (total - new)), slice(start, start + end)
            causal, _ = reads(past, end, 0, 0, lambda i: i + 1)
            stream, _ = reads(past, end, self.tail, self.sink, lambda i: self.recent)
            masks = [causal if role == "R" else stream for role in self.roles[module.layer_idx] for _ in range(group)]
            visible[row, :, into, keys] = torch.stack(masks)
        out, _ = reference.attention(q, k, v, visible, scaling)
        return out.transpose(1, 2).contiguous(), None
