"""Why a 2D mask is refused: one message for each cause, and the model and its cache are as they were."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import config_for, left_padded, tiny_model
from transformers import DynamicCache

from hf_longctx import LongCtxCache, UnsupportedModeError, patch_model

TEXT = torch.arange(3, 43)
WITH_PAD = TEXT.clone()
WITH_PAD[[7, 20]] = 0


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    return patch_model(model, config_for(model))


def refused(model, match: str, call) -> None:
    want = model(TEXT[None]).logits
    with pytest.raises(UnsupportedModeError, match=match):
        call()
    assert torch.equal(model(TEXT[None]).logits, want)


def test_the_pad_token_in_the_text_and_no_mask(model):
    match = "each token 0, the pad token, also between real tokens.*torch.ones_like"
    refused(model, match, lambda: model.generate(WITH_PAD[None], max_new_tokens=2))
    two = torch.stack([WITH_PAD, TEXT])
    refused(model, match, lambda: model.generate(two, max_new_tokens=2))
    given = {"attention_mask": torch.ones_like(WITH_PAD)[None], "max_new_tokens": 2}
    assert model.generate(WITH_PAD[None], **given).shape == (1, 42), "what the message says to do"


@pytest.mark.parametrize("kind", [LongCtxCache, lambda model: DynamicCache(config=model.config)])
def test_the_pad_token_in_what_the_cache_has_seen_and_no_mask(model, kind):
    cache, more = kind(model), torch.cat([WITH_PAD, TEXT[:3]])[None]
    with torch.no_grad():
        model(WITH_PAD[None], past_key_values=cache)
    known = "each token 0, the pad token, also between" if isinstance(cache, LongCtxCache) else "must be consecutive"
    refused(model, known, lambda: model.generate(more, max_new_tokens=2, past_key_values=cache))
    given = {"attention_mask": torch.ones_like(more), "past_key_values": cache, "max_new_tokens": 2}
    assert model.generate(more, **given).shape == (1, 45), "what the message says to do"


def test_texts_padded_before_they_were_joined(model):
    ids, mask = left_padded([20, 12])
    ids, mask = ids.repeat(1, 2), mask.repeat(1, 2)
    refused(model, "if it is padding, put it on the left", lambda: model.generate(ids, attention_mask=mask))


def test_something_before_the_pads(model):
    ids, mask = left_padded([40, 25])
    mask = torch.cat([torch.ones(2, 6), mask], 1)
    embeds = model.get_input_embeddings()(torch.cat([ids[:, :6] + 3, ids], 1))
    match = "Every row begins with 6 real tokens, and its pads follow.*virtual tokens"
    refused(model, match, lambda: model(inputs_embeds=embeds, attention_mask=mask))
    cache = LongCtxCache(model)
    with torch.no_grad():
        model(ids[:, :6] + 3, past_key_values=cache)
    refused(model, match, lambda: model(ids, attention_mask=mask, past_key_values=cache))
    assert cache.get_seq_length() == 6


def test_any_other_hole(model):
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[0, 7] = 0
    refused(model, "must be consecutive: pad on the left", lambda: model(TEXT[None], attention_mask=mask))
    embeds = model.get_input_embeddings()(TEXT[None])
    refused(model, "must be consecutive: pad on the left", lambda: model(inputs_embeds=embeds, attention_mask=mask))
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, 7] = mask[1, 9] = 0
    refused(model, "must be consecutive", lambda: model(TEXT.repeat(2, 1), attention_mask=mask))


@pytest.mark.parametrize(
    ("rows", "columns", "match"),
    [
        (1, 5, "covers the 5 new tokens and not the 40 cached ones. Pass the mask of the whole"),
        (1, 50, "columns for more than the 40 cached and 5 new tokens. Pass the cache that holds"),
        (1, 44, r"needs \(1, 45\): one column for each of the 40 cached and 5 new"),
        (2, 45, "the inputs have 1 rows. Pass one row of the mask for each"),
    ],
)
def test_another_shape(model, rows, columns, match):
    cache = LongCtxCache(model)
    with torch.no_grad():
        model(TEXT[None], past_key_values=cache)
    mask = torch.ones(rows, columns, dtype=torch.long)
    refused(model, match, lambda: model(TEXT[None, :5], attention_mask=mask, past_key_values=cache))
    assert cache.get_seq_length() == 40
