"""Every attention call of a patched model equals the dense-mask reference, over the table of shapes and modes."""

from __future__ import annotations

import pytest
import torch
from helpers.table import FACTORS, Case, every_pair, pairs, pairwise, product
from helpers.tiny import config_for, left_padded, tiny_model

from hf_longctx import LongCtxCache, patch_model
from hf_longctx.kernels import reference
from hf_longctx.layout.heads import RoleHeads
from hf_longctx.layout.reads import ALL
from hf_longctx.model.layer_call import join

CASES = pairwise()
DECODED = 3  # tokens decoded one by one after the prompt


def lengths_of(case: Case) -> list[int]:
    longest = case.tokens
    return {"one": [longest], "three": [longest] * 3, "padded": [longest, max(1, longest // 3), 1]}[case.batch]


def chunks_of(case: Case, total: int) -> list[int]:
    """Numbers of tokens of the forwards that read the prompt."""
    if case.mode == "one shot" or total < 3:
        return [total]
    if case.mode == "first chunk all pads":  # for the padded batch's short rows
        return [total // 2, total - total // 2]
    size = 16 if case.mode == "chunks" else 7
    return [min(size, total - done) for done in range(0, total, size)]


@torch.no_grad()
def run(model, case: Case) -> None:
    ids, mask = left_padded([length + DECODED for length in lengths_of(case)])
    total = ids.shape[1] - DECODED
    cache, done = LongCtxCache(model), 0
    for count in [*chunks_of(case, total), *[1] * DECODED]:
        done += count
        padded = None if case.batch != "padded" else mask[:, :done]
        model(ids[:, done - count : done], attention_mask=padded, past_key_values=cache)
    assert cache.get_seq_length() == total + DECODED


def check(case: Case, shadow) -> None:
    model = tiny_model(case.family, torch.float64, group=case.group)
    config = config_for(model, case.roles, *case.window, kernel=case.kernel)
    patch_model(model, config)
    watch = shadow(config)
    run(model, case)
    assert watch.calls == 3 * (len(chunks_of(case, case.tokens)) + DECODED)
    assert watch.error <= 1e-12


def test_the_table_covers_every_pair():
    covered = set().union(*map(pairs, CASES))
    assert covered == every_pair()
    values = [len(options) for options in FACTORS.values()]
    assert len(every_pair()) == (sum(values) ** 2 - sum(v * v for v in values)) // 2
    assert pairwise() == CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_equals_the_dense_mask(case, shadow):
    check(case, shadow)


@pytest.mark.slow
@pytest.mark.parametrize("case", product(), ids=str)
def test_attention_equals_the_dense_mask_full(case, shadow):
    check(case, shadow)


def test_a_window_off_by_one_is_seen(shadow):
    case = Case("llama", 4, "mixed", 65, "one", "one shot", (4, 16), "auto")
    model = tiny_model(case.family, torch.float64, group=case.group)
    config = config_for(model, case.roles, *case.window)
    patch_model(model, config)
    watch = shadow(config, recent_off_by=1)
    run(model, case)
    assert watch.error > 1e-4


@pytest.mark.parametrize(("kernel", "padded"), [("reference", False), ("reference", True), ("stock", False)])
def test_a_kernel_that_can_decode_all_roles_of_a_layer_at_once_does(kernel, padded, monkeypatch):
    """Once per layer and token, but for Transformers' own calls and roles that were kept in two dtypes."""
    model = tiny_model("llama", torch.float64)
    ids, mask = left_padded([23, 12] if padded else [23, 23])
    patch_model(model, config_for(model, kernel=kernel))
    calls = []

    def attend_layer(q, parts, scores):
        calls.append(len(parts))
        heads = [RoleHeads("", kv_heads, 4) for kv_heads, _ in parts]
        pairs = zip(heads, parts, strict=True)
        outs = [reference.attend(own.take(q, 2), segments, ALL, scores)[0] for own, (_, segments) in pairs]
        return join(heads, outs, 2), None

    def decode(change=None):
        calls.clear()
        cache, outs = LongCtxCache(model), []
        for columns in (slice(0, 20), slice(20, 21), slice(21, 22), slice(22, 23)):
            seen = mask[:, : columns.stop] if padded else None
            outs.append(model(ids[:, columns], attention_mask=seen, past_key_values=cache).logits[:, -1])
            if change is not None and columns.start == 0:
                for layer in cache.layers:
                    kept = layer.stores[0].segments["kept"]
                    kept.k, kept.v = kept.k.to(change), kept.v.to(change)
        return torch.stack(outs)

    with torch.no_grad():
        want = decode()
        assert not calls
        monkeypatch.setattr(reference, "attend_layer", attend_layer, raising=False)
        got = decode()
        assert calls == ([2] * 3 * 3 if kernel == "reference" else [])
        assert torch.allclose(got, want, rtol=0, atol=1e-9)
        assert decode(torch.float32).isfinite().all()
        assert not calls, "roles kept in two dtypes"
