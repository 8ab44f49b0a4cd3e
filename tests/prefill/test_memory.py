"""What a selection and a sparse prefill allocate: no mask of a whole prompt, no copy of a layer's keys and values."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from helpers.memory import Allocations
from helpers.pattern_cases import RETRIEVAL, tight
from helpers.tiny import config_for
from transformers import DynamicCache, LlamaConfig, LlamaModel

from hf_longctx import LongCtxCache, patched, report
from hf_longctx.cache.plan import LayerPlan, PrefillPlan
from hf_longctx.config.words import dump
from hf_longctx.kernels import _sparse_cpu
from hf_longctx.layout import blocks as layout
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.forward import Forward
from hf_longctx.layout.rows import Rows
from hf_longctx.layout.scores import Scores
from hf_longctx.model import layer_call
from hf_longctx.model.layer_call import LayerCall
from hf_longctx.prefill import _blocks
from hf_longctx.prefill.base import BLOCK, PatternSpec, select
from hf_longctx.stores.full import Full

LAST = 64


def cheap(word: str) -> PatternSpec:
    """The spec that reads the least; a stride of 1 would compute all scores to find it."""
    spec = tight(RETRIEVAL[word])
    return dataclasses.replace(spec, stride=16) if word == "antidiagonal" else spec


def random_qk(tokens, heads, kv_heads, dim=8):
    make = torch.Generator().manual_seed(tokens)
    return [torch.randn(1, n, tokens, dim, generator=make) for n in (heads, kv_heads)]


def numbers(tokens: int, heads: int) -> int:
    """The bound on every temporary of a selection, for heads of at most 64 numbers."""
    return max(_blocks.TEMPORARY, LAST * (tokens + LAST), heads * tokens, (tokens // BLOCK) ** 2)


@pytest.mark.parametrize("word", RETRIEVAL)
def test_no_temporary_grows_with_the_square_of_the_prompt(word):
    tokens, heads = 16384, 32
    q, k = random_qk(tokens, heads, 4)
    whole = heads * (tokens // BLOCK) ** 2
    with Allocations(but_for=whole if RETRIEVAL[word].reads_all else 0) as made:  # then the list itself is as large
        lists = select((cheap(word),) * heads, q, k, 0.3)
        lists.reads, lists.share_groups(8)
    bound = numbers(tokens, heads)
    assert tokens < made.largest <= bound
    with Allocations() as made:
        BlockList.from_mask(torch.ones(1, heads, *[tokens // BLOCK] * 2).bool(), block=BLOCK, first=0, kv_len=tokens)
    assert made.largest == whole > bound, "a control: a mask of all heads would be seen"


@pytest.mark.parametrize("word", [word for word, cls in RETRIEVAL.items() if not cls.reads_all])
def test_attention_copies_no_layer(word, monkeypatch):
    """Beside the output there lives less than half of a layer's keys and values."""
    for module, names in (
        (layout, ["TEMPORARY"]),
        (_blocks, ["TEMPORARY"]),
        (_sparse_cpu, ["TEMPORARY", "GATHERED"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, 1 << 16)
    tokens, heads = 2048, 8
    q, k = random_qk(tokens, heads, heads, dim=64)
    plan = PrefillPlan((cheap(word),) * heads, 0, False)
    stores = dict.fromkeys(("retrieval", "streaming"), Full())
    layer = LayerPlan.of(0, "R" * heads, stores, prefill=plan)
    call = LayerCall(layer, Forward(Rows(1, 0, tokens)), Scores(0.3))
    with torch.no_grad(), Allocations() as made:
        call.plain(q, k, k)
    assert q.nbytes < made.peak < q.nbytes + k.nbytes
    with torch.no_grad(), Allocations() as made:
        held = k.clone(), k.clone()
        call.plain(q, *held)
    assert made.peak > q.nbytes + k.nbytes, "a control: a copy of the keys and values would be seen"


@functools.cache
def model_of(tokens: int) -> LlamaModel:
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=tokens,
        attn_implementation="sdpa",
    )
    return LlamaModel(config).eval()


@torch.no_grad()
def peak(model, tokens: int, cache) -> int:
    """Bytes that live at a time in a prefill, at most."""
    ids = torch.zeros(1, tokens, dtype=torch.long).random_(0, 32, generator=torch.Generator().manual_seed(0))
    with Allocations() as made:
        model(ids, past_key_values=cache)
    return made.peak


@functools.cache
def stock_peak(tokens: int) -> int:
    return peak(model_of(tokens), tokens, DynamicCache(config=model_of(tokens).config))


@pytest.mark.parametrize("tokens", [8192, pytest.param(32768, marks=pytest.mark.slow)])
@pytest.mark.parametrize("word", RETRIEVAL)
def test_a_patched_model_needs_no_more_than_stock(word, tokens, monkeypatch):
    """But for the room in which its cache grows; of shorter prompts the fixed temporaries are a larger part."""
    model, pattern, stock = model_of(tokens), dump(cheap(word), "pattern"), stock_peak(tokens)
    with patched(model, config_for(model, "retrieval", prefill={"min_tokens": 0, "retrieval": pattern})):
        cache = LongCtxCache(model)
        ours = peak(model, tokens, cache)
        bound = stock + cache.nbytes - cache.nbytes_dense + 4096
        assert ours <= bound
        assert report(model).sparse == (0 if RETRIEVAL[word].reads_all else 2)
        if not RETRIEVAL[word].reads_all and tokens < 32768:  # which takes minutes as it is
            square, held = (tokens, tokens), []
            monkeypatch.setattr(
                layer_call, "select", lambda *args: held.append(torch.empty(square, dtype=torch.bool)) or select(*args)
            )
            assert peak(model, tokens, LongCtxCache(model)) > bound, "a control: one T x T mask would be seen"
