"""A trained model finds what it is asked for where its retrieval heads lie on disk and read a few per cent of it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longctx import LongCtxCache, patch_model, report
from hf_longctx.assets import asset
from hf_longctx.cache.seam import CACHE
from hf_longctx.tasks import task_from
from hf_longctx.tasks.forced import forced_over
from hf_longctx.tasks.language import language_for

FEW = {"select": "page_bounds", "page": 8, "budget": 64, "sink": 8, "recent": 32, "min_tokens": 0, "dense_layers": 0}


@pytest.fixture(scope="module")
def asked():
    """The model, and a document of 4000 tokens with what is asked of it."""
    folder = asset("tiny-llama")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, task_from("needle").make(language_for(AutoTokenizer.from_pretrained(folder)), 4000, None, 5)


def read(model, sample, **sections) -> LongCtxCache:
    patch_model(model, "auto", **sections)
    cache = LongCtxCache(model)
    with torch.no_grad():
        for piece in torch.as_tensor(sample.context).split(512):
            model(piece[None], **{CACHE: cache}, logits_to_keep=1)
    return cache


def test_the_needle_is_found_in_a_context_on_disk(asked, tmp_path):
    model, sample = asked
    disk = {"store": "offloaded_disk", "page": 256, "recent": 256, "folder": str(tmp_path)}
    cache = read(model, sample, stores={"retrieval": disk}, decode={"retrieval": FEW})
    held = cache.nbytes
    found = forced_over(model, sample, cache, keep=False)
    assert found and all(one.right for one in found)
    assert report(model).read < 0.06 and report(model).notes == ()
    layers, heads = len(cache.own), sum(plan.letters.count("R") for plan in cache.plans)
    number = 2 * cache.own[0].head_dim * 4  # bytes of a token's key and value
    assert cache.nbytes_offloaded["on disk"] > 0.85 * heads * cache.seen * number
    index = heads * cache.seen // 8 * number
    assert held < cache.nbytes < held + 1.2 * index + layers * 16 * 1024, "the index, and nothing of the pages"


def test_where_no_head_reads_it_the_needle_is_lost(asked):
    """A control."""
    model, sample = asked
    letters = [plan.letters for plan in read(model, sample).plans]
    cache = read(model, sample, heads={"roles": ["S" * len(row) for row in letters]})
    assert not all(one.right for one in forced_over(model, sample, cache, keep=False))
