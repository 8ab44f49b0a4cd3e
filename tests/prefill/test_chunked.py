"""A prompt read in chunks is chosen for chunk by chunk: how far that is from what is chosen for the whole prompt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.calls import sparse
from helpers.recall import attention as weights_of
from helpers.slow_blocks import random_qk
from transformers import AutoModelForCausalLM

from hf_longctx import patched
from hf_longctx.assets import asset
from hf_longctx.config.words import dump, load, words
from hf_longctx.kernels import cpu
from hf_longctx.model import layer_call
from hf_longctx.prefill.antidiagonal import Antidiagonal
from hf_longctx.prefill.base import BLOCK, select
from hf_longctx.prefill.block_topk import BlockTopk
from hf_longctx.prefill.flexprefill import Flexprefill
from hf_longctx.prefill.vertical_slash import VerticalSlash
from hf_longctx.tasks.documents import TinyDocuments
from hf_longctx.tasks.haystack import TinyFiller

TOKENS = 2048
# Of each spec, how much attention mass the chunks may lose, and the largest share of keys read by one of the two only.
# Measured (chunks of 512, of 300): vertical_slash loses 0.003, 0.002, differs by 0.47, 0.67; flexprefill by lines gains
# 0.07, 0.09, differs by 0.67, 0.87; forced to choose blocks it loses 0.07, 0.07, differs by 0.44, 0.46. The other two
# choose for each query block by itself: only a block that a chunk cuts in two is chosen for otherwise.
BOUNDS = {
    512: {
        VerticalSlash(400, 4): (0.02, 0.6),
        Flexprefill(0.5, 0.1, 64): (0.0, 0.75),
        Flexprefill(0.8, 1.0, 64): (0.1, 0.55),
        Antidiagonal(8, 0.5): (0.0, 0.0),
        BlockTopk(8): (0.0, 0.0),
    },
    300: {
        VerticalSlash(400, 4): (0.02, 0.8),
        Flexprefill(0.5, 0.1, 64): (0.0, 1.0),
        Flexprefill(0.8, 1.0, 64): (0.1, 0.55),
        Antidiagonal(8, 0.5): (0.01, 0.1),
        BlockTopk(8): (0.01, 0.05),
    },
}
EVERYTHING = (VerticalSlash(10**9, 10**9), Flexprefill(1.0), Antidiagonal(threshold=1.0), BlockTopk(10**9))


def test_only_dynamic_patterns_are_here():
    dynamic = {cls for word in words("prefill") if "retrieval" in (cls := load("prefill", word)).roles}
    for specs in (*BOUNDS.values(), EVERYTHING):
        assert {type(spec) for spec in specs} <= {cls for cls in dynamic if not cls.reads_all}


def chunks_of(spec, step: int, monkeypatch) -> list[list[tuple]]:
    """What `select` was asked and answered in a generate by chunks of ``step``: by layer, ((q, k, scale), list)."""
    calls, model = [], AutoModelForCausalLM.from_pretrained(asset("tiny-llama"), dtype=torch.float32).eval()

    def look(heads, q, k, scale):
        calls.append(((q.clone(), k.clone(), scale), select(heads, q, k, scale)))
        return calls[-1][1]

    monkeypatch.setattr(layer_call, "select", look)
    ids = torch.from_numpy(TinyDocuments(TinyFiller()).draw(np.random.default_rng(0), TOKENS).ids)[None]
    with patched(model, prefill={"min_tokens": 0, "retrieval": dump(spec, "pattern")}):
        model.generate(ids, max_new_tokens=1, do_sample=False, prefill_chunk_size=step, cache_implementation="dynamic")
    layers = sum(q.shape[2] == k.shape[2] for (q, k, _), _ in calls)
    assert layers and len(calls) == layers * -(-TOKENS // step)
    return [calls[layer::layers] for layer in range(layers)]


@pytest.mark.spanning("step", "spec")
@pytest.mark.parametrize(("step", "spec"), [(step, spec) for step, specs in BOUNDS.items() for spec in specs], ids=str)
def test_chunks_keep_the_attention(step, spec, monkeypatch):
    lost, differ, worse = [], [], []
    i, j = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    always = (j <= i) & ((j < BLOCK) | (j // BLOCK == i // BLOCK))
    for chunks in chunks_of(spec, step, monkeypatch):
        _, k, scale = chunks[-1][0]
        q = torch.cat([own for (own, _, _), _ in chunks], 2)
        assert q.shape[2] == k.shape[2] == TOKENS
        once = select((spec,) * q.shape[1], q, k, scale)
        whole = once.visible()
        cut = torch.cat([torch.nn.functional.pad(one.visible(), (0, TOKENS - one.kv_len)) for _, one in chunks], 2)
        assert cut[..., always].all(), "every query reads the sinks and its own block"
        weights = weights_of(q, k, scale)
        mass = [(weights * reads).sum(-1).mean().item() for reads in (whole, cut, always)]
        lost.append(mass[0] - mass[1])
        worse.append(mass[0] - mass[2])
        differ.append(((whole ^ cut).sum() / whole.sum()).item())
    most_lost, most_different = BOUNDS[step][spec]
    assert np.mean(lost) <= most_lost
    assert np.mean(differ) <= most_different
    assert np.mean(worse) > most_lost, "a control: what is always read would not pass"


@pytest.mark.parametrize("spec", EVERYTHING, ids=str)
@pytest.mark.parametrize("step", [128, 150])
def test_a_budget_of_everything_is_the_same_in_chunks(step, spec):
    q, k = random_qk(400, 400, 2, 2)
    v = torch.randn(k.shape, dtype=torch.float64)

    def run(spec, step):
        outs = []
        for low in range(0, 400, step):
            part, seen = q[:, :, low : low + step], slice(0, min(400, low + step))
            lists = select((spec,) * 4, part, k[:, :, seen], 0.9)
            outs.append(sparse(cpu, part, k[:, :, seen], v[:, :, seen], lists, 0.9))
        return torch.cat(outs, 2)

    assert (run(spec, step) - run(spec, 400)).abs().max() <= 1e-12
    tight = VerticalSlash(1, 1)
    assert (run(tight, step) - run(spec, 400)).abs().max() > 1e-3, "a control"
