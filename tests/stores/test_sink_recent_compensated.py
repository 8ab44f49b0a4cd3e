"""``store: sink_recent_compensated`` against its rule: every attention call from all keys ever written."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from table import Case, pairwise
from tiny import Shadow, config_for, left_padded, tiny_model

import hf_longctx.attention
from hf_longctx import CacheError, ConfigError, LongCtxCache, LongCtxConfig, patch_model, report
from hf_longctx.stores.sink_recent import SLACK
from hf_longctx.stores.sink_recent_compensated import Growing, SinkRecentCompensated

DECODED = 3
WORD = "sink_recent_compensated"
CASES = [(case, case.window[1]) for case in pairwise() if case.roles != "retrieval"]
GROWING = [
    (Case("llama", 1, "streaming", 257, "padded", "odd chunks", (4, 5), "auto"), {"min": 5, "fraction": 0.3}),
    (Case("mistral", 4, "mixed", 257, "one", "chunks", (0, 16), "reference"), {"min": 16, "fraction": 0.9}),
    (Case("qwen2", 7, "by layer", 65, "three", "one shot", (16, 1), "auto"), {"min": 1, "fraction": 0.01}),
    (Case("qwen3", 4, "mixed", 300, "padded", "first chunk all pads", (7, 1), "auto"), {"min": 1, "fraction": 0.5}),
]


def window(recent: int | dict, i: int) -> int:
    """Tokens of the window of the query at row position i, from the rule alone."""
    if isinstance(recent, int):
        return recent
    return max(recent["min"], int(recent["fraction"] * (i + 1)))


def expected(q, k, v, sink, recent, scale, compensated=True):
    """Attention ``[H, T, D]`` of one row without pads: q ``[H, T, D]``, the last T of S tokens; k, v ``[H, S, D]``."""
    first = k.shape[1] - q.shape[1]
    outs = []
    for i in range(first, k.shape[1]):
        j = torch.arange(i + 1)
        sees = (j < sink) | (i - j < window(recent, i))
        keys, values = k[:, : i + 1][:, sees], v[:, : i + 1][:, sees]
        scores = (keys @ q[:, i - first, :, None])[..., 0] * scale
        if compensated and not sees.all():
            gone = ~sees
            mean_k, mean_v = (x[:, : i + 1][:, gone].mean(1) for x in (k, v))
            score = (mean_k * q[:, i - first]).sum(-1, keepdim=True) * scale + gone.sum().double().log()
            scores, values = torch.cat([scores, score], -1), torch.cat([values, mean_v[:, None]], 1)
        outs.append((scores.softmax(-1)[:, None] @ values)[:, 0])
    return torch.stack(outs, 1)


class Watch(Shadow):
    """`Shadow` with this store's rule in place of the dense mask."""

    compensated = True

    def check(self, module, q, kept, out, scaling) -> None:
        k, v = self.keys[module.layer_idx]
        rows, plan, group = kept.rows, module.longctx_plan, q.shape[1] // k.shape[1]
        store, everything = self.config.stores.streaming, 10**9
        recent = store.recent if isinstance(store.recent, int) else vars(store.recent)
        rules = {"R": (0, everything), "S": (store.sink, recent if not self.off else recent - self.off)}
        if plan.sliding:
            rules = dict.fromkeys("RS", (0, plan.stores["streaming"].recent))
        for row, start in enumerate(rows.starts or (0,) * q.shape[0]):
            pads = min(max(0, start - rows.past), q.shape[2])
            for head, role in enumerate(plan.roles if pads < q.shape[2] else ""):
                own = slice(head * group, (head + 1) * group)
                keys, values = (x[row, head, start:].expand(group, -1, -1) for x in (k, v))
                means = self.compensated and role == "S" and not plan.sliding
                want = expected(q[row, own, pads:], keys, values, *rules[role], scaling, means)
                got = out[row, pads:, own].transpose(0, 1)
                assert not torch.isnan(got).any()
                self.error = max(self.error, (got - want).abs().max().item())
        self.calls += 1


@pytest.fixture
def watch(monkeypatch):
    yield lambda config, **kwargs: Watch(monkeypatch, config, **kwargs)
    monkeypatch.undo()
    hf_longctx.attention.register()


def configured(model, roles="mixed", sink=4, recent=16, **top) -> LongCtxConfig:
    config = config_for(model, roles, **top)
    return config.override(stores={"streaming": {"store": WORD, "sink": sink, "recent": recent}})


def patched_tiny(roles="mixed", sink=4, recent=16, family="llama", **kwargs):
    model = tiny_model(family, torch.float64, **kwargs)
    return patch_model(model, configured(model, roles, sink, recent))


def read(model, cache, ids, mask=None) -> torch.Tensor:
    """Feed new tokens; the logits of the last one."""
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]


def chunks_of(case: Case) -> list[int]:
    total = case.tokens
    if case.mode == "one shot" or total < 3:
        return [total]
    if case.mode == "first chunk all pads":
        return [total // 2, total - total // 2]
    size = 16 if case.mode == "chunks" else 7
    return [min(size, total - done) for done in range(0, total, size)]


def run(model, case: Case) -> None:
    total = case.tokens
    lengths = {"one": [total], "three": [total] * 3, "padded": [total, max(1, total // 3), 1]}[case.batch]
    ids, mask = left_padded([length + DECODED for length in lengths])
    cache, done = LongCtxCache(model), 0
    for count in [*chunks_of(case), *[1] * DECODED]:
        done += count
        read(model, cache, ids[:, done - count : done], mask[:, :done] if case.batch == "padded" else None)


@pytest.mark.parametrize(("case", "recent"), [*CASES, *GROWING], ids=str)
def test_every_attention_call_follows_the_rule(case, recent, watch):
    model = tiny_model(case.family, torch.float64, group=case.group)
    config = configured(model, case.roles, case.window[0], recent, kernel=case.kernel)
    patch_model(model, config)
    seen = watch(config)
    run(model, case)
    assert seen.calls == 3 * (len(chunks_of(case)) + DECODED)
    assert seen.error <= 1e-12


def test_a_window_off_by_one_and_a_missing_mean_are_seen(watch):
    case = Case("llama", 4, "mixed", 65, "padded", "odd chunks", (4, 16), "auto")
    model = tiny_model(case.family, torch.float64, group=case.group)
    config = configured(model, case.roles, *case.window)
    patch_model(model, config)
    seen = watch(config, recent_off_by=1)
    run(model, case)
    assert seen.error > 1e-4
    seen.off, seen.error = 0, 0.0
    seen.keys.clear()
    run(model, case)
    assert seen.error <= 1e-12
    seen.compensated = False
    seen.keys.clear()
    run(model, case)
    assert seen.error > 1e-4
