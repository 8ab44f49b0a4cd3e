"""A selection in models of every record of ``patches/``: with sinks, softcaps, windows of their own, other layers."""

from __future__ import annotations

import pytest
import torch
from helpers.every_family import ONE_EACH, TYPES, Case, logits, tiny_model
from helpers.select_cases import SMALL
from helpers.tiny import config_for, left_padded

from hf_longctx import LongCtxCache, patch_model, report
from hf_longctx.decode.page_bounds import PageBounds
from hf_longctx.model.family import find_family
from hf_longctx.model.modules import state_of

HYBRIDS = tuple(name for name in ("lfm2", "qwen3_next", "olmo_hybrid", "llama4_text") if name in TYPES)
NAMES = tuple(dict.fromkeys((*ONE_EACH, "gpt_oss", *HYBRIDS)))
PROMPT, NEW = 50, 6


def patched(name: str, spec, window: bool | None = None, **top):
    """``window``: whether layers have windows; None: where not all of them would have one."""
    torch.manual_seed(0)
    model = tiny_model(Case(name, find_family(name).sliding != "all" if window is None else window))
    decode = {"decode": {"retrieval": spec}} if spec else {}
    return patch_model(model, config_for(model, "retrieval", **top, **decode))


def decoded(model, ids, mask) -> torch.Tensor:
    """Logits of the last tokens, each read alone."""
    return logits(model, ids, mask, range(PROMPT, PROMPT + NEW), LongCtxCache(model))[:, PROMPT:]


def texts():
    ids, mask = left_padded([PROMPT, 41], vocab=48)
    more = torch.randint(3, 48, (2, NEW))
    return torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)


@pytest.mark.parametrize("name", NAMES)
def test_choosing_everything_equals_dense_and_a_few_pages_do_not(name, monkeypatch):
    """Also what the kernels agree on, of a list, and that what is not the whole text is left alone."""
    ids, mask = texts()
    want = decoded(patched(name, None), ids, mask)
    few = PageBounds(**SMALL, page=4, budget=4)
    outs = []
    for kernel in ("auto", "reference"):
        model = patched(name, few, kernel=kernel)
        outs.append(decoded(model, ids, mask))
        said = report(model)
    selecting = [plan for plan in state_of(model).plans if any(role.selects for role in plan.filled)]
    assert all(plan.window is None for plan in selecting)
    torch.testing.assert_close(*outs, rtol=0, atol=1e-6)
    assert selecting and said.chosen == len(selecting) * 2 * NEW and 0 < said.read < 1
    assert (outs[0] - want).abs().max() > 1e-4
    monkeypatch.setattr(PageBounds, "runs", lambda self, processed: processed > 30)
    every = PageBounds(**SMALL, page=4)
    torch.testing.assert_close(decoded(patched(name, every), ids, mask), want, rtol=0, atol=1e-5)


def test_a_model_of_windows_alone_selects_nothing():
    ids, mask = texts()
    model = patched("phi3", PageBounds(**SMALL, page=4, budget=4), window=True)
    want = decoded(patched("phi3", None, window=True), ids, mask)
    assert torch.equal(decoded(model, ids, mask), want) and report(model).read is None


def test_families_with_sinks_and_softcaps_are_among_them():
    assert {"gpt_oss", "gemma2"} <= set(NAMES) and HYBRIDS
