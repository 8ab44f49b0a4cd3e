"""What a record may say, and what the report says of one that maps scores."""

from __future__ import annotations

import pytest
import torch
from helpers.every_family import Case, logits, tiny_model
from helpers.tiny import config_for, left_padded

from hf_longctx import ConfigError, Family, patch_model, report


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
@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_the_report_says_that_stock_computes_no_such_scores(kind, kernel):
    model, (ids, mask) = tiny_model(Case(kind, True)), left_padded([30])
    patch_model(model, config_for(model, "retrieval"))
    want = logits(model, ids, mask)
    patch_model(model, config_for(model, "retrieval", kernel=kernel))
    assert torch.allclose(logits(model, ids, mask), want, atol=1e-9, rtol=0)
    said = [note for note in report(model).notes if note.startswith("kernel stock: it computes no")]
    assert len(said) == (kernel == "stock") and "stock" not in report(model).kernels


@pytest.mark.parametrize("window", [True, False])
def test_windows_in_every_layer_are_told(window, caplog):
    """Phi-3.5's are longer than its context; without them its heads have roles, and no short text is read otherwise."""
    model, (ids, mask) = tiny_model(Case("phi3", window)), left_padded([9])
    patch_model(model, config_for(model, "retrieval"))
    want = logits(model, ids, mask)
    told = [note for note in report(model).notes if note.startswith("every layer has a sliding window")]
    assert len(told) == window == ("every layer has a sliding window" in caplog.text)
    model.config.sliding_window = None
    patch_model(model, config_for(model, "retrieval"))
    assert torch.allclose(logits(model, ids, mask), want, atol=1e-9, rtol=0)
    assert not [note for note in report(model).notes if note.startswith("every layer")]
