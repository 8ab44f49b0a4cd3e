"""Every attention call of a patched model equals the dense-mask reference, over the table of shapes and modes."""

from __future__ import annotations

import pytest
import torch
from table import FACTORS, Case, every_pair, pairs, pairwise, product
from tiny import config_for, left_padded, tiny_model

from hf_longctx import LongCtxCache, patch_model

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
