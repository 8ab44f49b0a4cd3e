"""Dynamic patterns keep at least the attention that an A-shape keeps with as many blocks."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers.recall import a_shape, attention, blocks_read, kept_mass, retrieval_heads, topics, worst

from hf_longctx.assets import assets
from hf_longctx.config.words import load, words
from hf_longctx.layout.blocks import BlockList
from hf_longctx.prefill.antidiagonal import Antidiagonal
from hf_longctx.prefill.base import select
from hf_longctx.prefill.block_topk import BlockTopk
from hf_longctx.prefill.flexprefill import Flexprefill
from hf_longctx.prefill.vertical_slash import VerticalSlash

MODELS = ("tiny-llama", "tiny-mistral", "tiny-qwen3")
# Heads that retrieve look for single tokens. The mean key of a block says little about those in tiny-llama and
# tiny-mistral: there block_topk keeps up to 0.11 and 0.03 less than the A-shape, so it is held to it in tiny-qwen3 and,
# like flexprefill where it is forced to be query-aware, on blocks with a topic. In tiny-qwen3 flexprefill by lines and
# the A-shape are level (within 0.01, one document either way), so it is not held to it there.
TOKENS = {
    "antidiagonal": (Antidiagonal(8, 0.5), Antidiagonal(4, 0.8)),
    "flexprefill": (Flexprefill(0.5, 0.1, 64), Flexprefill(0.8, 0.1, 64)),
    "vertical_slash": (VerticalSlash(200, 8), VerticalSlash(400, 4)),
}
MEANS = {"block_topk": (BlockTopk(4),)}
TOPICS = {
    "antidiagonal": (Antidiagonal(8, 0.9),),
    "block_topk": (BlockTopk(8), BlockTopk(12)),
    "flexprefill": (Flexprefill(0.9, 0.1, 64), Flexprefill(0.9, 1.0, 64)),
}


def specs(table):
    return [pytest.param(spec, id=f"{word}-{i}") for word, some in table.items() for i, spec in enumerate(some)]


@functools.cache
def documents(name="tiny-llama"):
    seeds = (0, 1) if name == "tiny-llama" else (0,)
    return [layer for seed in seeds for layer in retrieval_heads(2048, seed, name)]


def masses(spec, layers) -> tuple[float, float, float]:
    """Mean over layers and heads: what the pattern keeps, what the A-shape does, what the worst choice does."""
    found = []
    for q, k, scale in layers:
        weights, lists = attention(q, k, scale), select((spec,) * q.shape[1], q, k, scale)
        assert 0.05 < lists.density < 0.75, "neither everything nor only what is always read"
        others = (a_shape(lists), worst(lists, weights))
        assert all(torch.equal(other.counts, blocks_read(lists)) for other in others)
        found.append([kept_mass(one, weights).mean() for one in (lists, *others)])
    return tuple(torch.tensor(found).mean(0).tolist())


def test_patterns_and_models_are_there():
    dynamic = {word for word in words("prefill") if "retrieval" in load("prefill", word).roles}
    assert set(TOKENS) | set(MEANS) == set(TOKENS) | set(TOPICS) <= dynamic - {"dense"}
    assert set(MODELS) <= set(assets())
    assert all(documents(name) for name in MODELS)


@pytest.mark.spanning("spec", "name")
@pytest.mark.parametrize(
    ("spec", "name"),
    [(spec, MODELS[0]) for some in TOKENS.values() for spec in some]
    + [(some[0], "tiny-mistral") for some in TOKENS.values()]
    + [(TOKENS[word][0], "tiny-qwen3") for word in ("antidiagonal", "vertical_slash")]
    + [(some[0], "tiny-qwen3") for some in MEANS.values()],
    ids=str,
)
def test_retrieval_heads_keep_more_than_an_a_shape(spec, name):
    ours, local, least = masses(spec, documents(name))
    assert ours >= local
    assert least < local, "a control: another choice of as many blocks would not pass"


@pytest.mark.parametrize("spec", specs(TOPICS))
def test_heads_of_topics_keep_more_than_an_a_shape(spec):
    ours, local, least = masses(spec, [topics(2048)])
    assert ours >= local
    assert least < local, "a control"


def test_flexprefill_finds_out_which_kind_a_head_is():
    spec = Flexprefill(0.9, 0.1, 64)
    q, k, scale = topics(2048)
    assert select((spec,), q, k, scale).column_counts.sum() == 0
    for q, k, scale in documents():
        assert (select((spec,) * q.shape[1], q, k, scale).column_counts > 0).all()


def test_kept_mass_counts_what_is_read():
    q, k, scale = topics(256)
    weights = attention(q, k, scale)
    every = BlockList.from_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool), block=64, first=0, kv_len=256)
    own = BlockList.from_mask(torch.eye(4, dtype=torch.bool)[None, None], block=64, first=0, kv_len=256)
    want = [weights[0, 0, 64 * b : 64 * b + 64, 64 * b : 64 * b + 64].sum().item() for b in range(4)]
    torch.testing.assert_close(kept_mass(every, weights), torch.ones(1, 1))
    torch.testing.assert_close(kept_mass(own, weights).item(), sum(want) / 256)
    assert blocks_read(every).tolist() == [[[1, 2, 3, 4]]]
    assert a_shape(own).block_mask()[0, 0].sum(-1).tolist() == [1, 1, 1, 1]
