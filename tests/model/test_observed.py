"""observe() over a LongCtxCache: what each role's heads still have, by row position, and what is gone."""

from __future__ import annotations

import pytest
import torch
from helpers.caches import patched_tiny
from helpers.store_cases import BY_DATA, CASES, ROUNDED, patched_case, role_of
from helpers.tiny import left_padded

from hf_longctx import LongCtxCache, UnsupportedModeError, observe

LENGTHS = [70, 33, 5]
STEPS = [20, 40, 1, 1, 17, 1, 1, 1]  # tokens of each forward


class Written:
    """Every key and value ever written, by layer."""

    def __init__(self, monkeypatch):
        self.pairs = {}
        update = LongCtxCache.update

        def watched(cache, k, v, layer_idx, *args, **kwargs):
            old = self.pairs.get(layer_idx, (k[:, :, :0], v[:, :, :0]))
            self.pairs[layer_idx] = tuple(torch.cat(pair, 2) for pair in zip(old, (k, v), strict=True))
            return update(cache, k, v, layer_idx, *args, **kwargs)

        monkeypatch.setattr(LongCtxCache, "update", watched)


def run(model, watch) -> None:
    ids, mask = left_padded([length + sum(STEPS) - max(LENGTHS) for length in LENGTHS])
    cache, past = LongCtxCache(model), 0
    with torch.no_grad(), observe(model, watch):
        for step in STEPS:
            past += step
            model(ids[:, past - step : past], attention_mask=mask[:, :past], past_key_values=cache)


@pytest.mark.parametrize("case", [case for case in CASES if case not in BY_DATA])
def test_every_cached_token_is_shown_with_its_position(case, monkeypatch):
    model = patched_case(case, torch.float64)
    written, shown = Written(monkeypatch), []
    rounded = case in ROUNDED

    def watch(layer_idx, q, k, v, scaling, rows, compute):
        assert k is v and [one.heads.role for one in k] == ["retrieval", "streaming"]
        for one in k:
            for row in range(rows.batch):
                start, count = rows.start(row), rows.real(row)[1]
                keys, values, positions = one.sequence(row)
                assert one.dropped(row) == count - positions.numel()
                assert positions.unique().numel() == positions.numel(), "no token twice"
                for found, pair in ((keys, 0), (values, 1)):
                    want = one.heads.take(written.pairs[layer_idx][pair])[row, :, start + positions]
                    torch.testing.assert_close(found, want, rtol=0, atol=0.5 if rounded else 0)
                shown.append((one.heads.role, rows.new, count, sorted(positions.tolist())))

    run(model, watch)
    for role, new, count, positions in shown:
        everything = list(range(count))
        if role == "retrieval":
            assert positions == everything
        elif role_of(case) == "streaming" and isinstance(CASES[case]["recent"], int):
            sink, recent = CASES[case]["sink"], CASES[case]["recent"]
            window = [j for j in everything if j < sink or j >= count - recent - (new - 1)]
            assert positions == window if new == 1 else set(window) <= set(positions)
    assert {new for _, new, _, _ in shown} == set(STEPS) and len(shown) == 3 * 2 * len(LENGTHS) * len(STEPS)


def test_a_wrong_position_is_seen(monkeypatch):
    """A control of the test above."""
    model, wrong = patched_tiny(), []
    written = Written(monkeypatch)

    def watch(layer_idx, q, k, v, scaling, rows, compute):
        keys, _, positions = k[1].sequence(0)
        want = k[1].heads.take(written.pairs[layer_idx][0])[0, :, (rows.start(0) + positions + 1) % rows.total]
        wrong.append((keys - want).abs().max())

    run(model, watch)
    assert min(wrong) > 1e-3


def test_the_observer_may_replace_the_output_and_is_told_what_is_gone():
    model = patched_tiny("by layer")
    ids, asked = torch.randint(3, 97, (1, 60)), []

    def double(layer_idx, q, k, v, scaling, rows, compute):
        assert len(k) == (1 if layer_idx < 2 else 2)
        if layer_idx == 2:
            with pytest.raises(UnsupportedModeError, match=r"layer 2: its streaming heads .*DynamicCache"):
                compute("retrieval")
            asked.append(repr(k))
            return None
        return compute(k[0].heads.role)

    want = model(ids, past_key_values=LongCtxCache(model)).logits
    with torch.no_grad(), observe(model, double):
        got = model(ids, past_key_values=LongCtxCache(model)).logits
    torch.testing.assert_close(got, want)
    assert "streaming heads" in asked[0] and "tokens dropped by sequence: 0" in asked[0]
    with torch.no_grad(), observe(model, lambda layer_idx, q, *args: torch.zeros_like(q)):
        assert (model(ids, past_key_values=LongCtxCache(model)).logits - want).abs().max() > 1e-3


def test_generate_inside_of_it_shows_a_cache_that_is_given():
    model, shown = patched_tiny(), []
    cache = LongCtxCache(model)
    with observe(model, lambda layer, q, k, *args: shown.append((q.shape[2], repr(k)))):
        model.generate(torch.randint(3, 97, (1, 60)), past_key_values=cache, max_new_tokens=3)
    assert [new for new, _ in shown] == [60] * 3 + [1] * 6
    assert "tokens dropped by sequence: 42" in shown[-1][1], "62 tokens, of which 4 + 16 are kept"
