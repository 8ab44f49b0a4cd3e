"""Families whose attention asks for a softcap or for sinks: three lines of data, equal to Transformers' own."""

from __future__ import annotations

import pytest
import torch
from helpers.registered import nothing_kept
from helpers.tiny import config_for, left_padded
from transformers import AutoConfig, AutoModelForCausalLM

from hf_longctx import ConfigError, Family, LongCtxCache, UnsupportedModelError, patch_model, register, report
from hf_longctx.cache.seam import CACHE

SCORES = {"gemma2": {"softcap": "softcap"}, "gpt_oss": {"s_aux": "sinks"}}
MORE = {
    "gemma2": {"attn_logit_softcapping": 0.05, "query_pre_attn_scalar": 8},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": {"rope_type": "default"}},
}


@pytest.fixture(autouse=True)
def _forget():
    with nothing_kept():
        yield


@pytest.fixture(autouse=True)
def _eager_in_float64(monkeypatch):
    """Eager attention of these models takes its softmax in float32."""
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=None, **kwargs: x.softmax(dim))


def model_of(kind: str):
    config = AutoConfig.for_model(
        kind,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=13,
        initializer_range=0.3,
        pad_token_id=0,
        **MORE[kind],
    )
    config._experts_implementation = "eager"  # grouped products know no float64
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, 1.0)
    return model


def outputs(model, ids, mask, steps, make=None) -> torch.Tensor:
    """The logits of the last token at the end of each step; without a cache each step reads the whole text."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = None if make is None else make(model)
    past, found = 0, []
    for end in steps:
        new = slice(past if make else 0, end)
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, new], CACHE: cache}
        with torch.no_grad():
            found.append(model(ids[:, new], use_cache=make is not None, **given).logits[:, -1])
        past = end
    return torch.stack(found)


@pytest.mark.parametrize("kernel", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("kind", SCORES)
def test_all_heads_retrieval_equals_eager(kind, kernel):
    """A left-padded batch equals its sequences alone: of padded ones eager attention gives NaN in float64."""
    model, steps = model_of(kind), [40, 41, 42, 60, 61]
    ids, mask = left_padded([61, 45])
    pairs = [(ids[:1], mask[:1], 0), (ids[1:, 16:], mask[1:, 16:], 16)]
    want = torch.cat([outputs(model, *pair, [end - pads for end in steps]) for *pair, pads in pairs], 1)
    register("family", kind, Family(kind, sliding="layer_types", scores=SCORES[kind]))
    patch_model(model, config_for(model, "retrieval", kernel=kernel))
    for make in (LongCtxCache, None):
        assert (outputs(model, ids, mask, steps, make) - want).abs().max() < 1e-10, make


@pytest.mark.parametrize("kind", SCORES)
def test_a_record_that_does_not_map_the_keyword_is_refused(kind):
    model, (ids, _) = model_of(kind), left_padded([30])
    register("family", kind, Family(kind, sliding="layer_types"))
    patch_model(model, config_for(model, "retrieval"))
    with pytest.raises(UnsupportedModelError, match=next(iter(SCORES[kind]))):
        model(ids)


@pytest.mark.parametrize("kind", SCORES)
def test_the_mapped_field_changes_the_answer(kind):
    """A control: the same weights without the softcap or the sinks answer otherwise."""
    model, (ids, mask) = model_of(kind), left_padded([30])
    register("family", kind, Family(kind, sliding="layer_types", scores=SCORES[kind]))
    patch_model(model, config_for(model, "retrieval"))
    want = outputs(model, ids, mask, [30])
    for layer in model.base_model.layers:
        if kind == "gemma2":
            layer.self_attn.attn_logit_softcapping = 1e6
        else:
            layer.self_attn.sinks.data.fill_(-1e6)
    assert (outputs(model, ids, mask, [30]) - want).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"scores": {"softcap": "softcp"}}, r"scores: got 'softcp'.*softcap, sinks.*'softcap'\?"),
        ({"scores": {"bias": "first_bias"}}, "scores: got 'first_bias', expected one of: softcap, sinks"),
        ({"scores": {"scaling": "scale"}}, "scores: got 'scale'"),
        ({"scores": {"cap": "softcap", "softcap": "softcap"}}, "scores: got .*at most one keyword"),
        ({"scores": "softcap"}, "scores: got 'softcap', expected a mapping"),
        ({"sliding": "some"}, "sliding: got 'some'.*none, all, layer_types"),
    ],
)
def test_a_record_that_says_what_there_is_not_is_refused_where_it_is_made(given, parts):
    with pytest.raises(ConfigError, match=parts):
        Family("gemma2", **given)


@pytest.mark.parametrize("kernel", ["stock", "auto"])
@pytest.mark.parametrize("kind", SCORES)
def test_the_report_says_that_stock_computes_no_such_scores(kind, kernel):
    model, (ids, mask) = model_of(kind), left_padded([30])
    register("family", kind, Family(kind, sliding="layer_types", scores=SCORES[kind]))
    patch_model(model, config_for(model, "retrieval"))
    want = outputs(model, ids, mask, [30])
    patch_model(model, config_for(model, "retrieval", kernel=kernel))
    assert torch.allclose(outputs(model, ids, mask, [30]), want, atol=1e-9, rtol=0)
    said = [note for note in report(model).notes if note.startswith("kernel stock: it computes no")]
    assert len(said) == (kernel == "stock") and "stock" not in report(model).kernels
