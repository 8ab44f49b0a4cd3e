"""Multimodal models: the language model inside is patched, and an image in the prompt is tokens as any other."""

from __future__ import annotations

import pytest
import torch
from helpers.every_family import softmax_in_float64
from helpers.forgeries import Forger
from helpers.tiny import config_for
from helpers.with_images import model_with_images, prompt_with_image
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import hf_longctx
from hf_longctx import (
    CacheError,
    LongCtxCache,
    LongCtxConfig,
    PromptCache,
    UnsupportedModeError,
    patch_model,
    report,
    unpatch_model,
)
from hf_longctx.cache.file import AHEAD
from hf_longctx.cache.seam import CACHE
from hf_longctx.model.family import families, find_family
from hf_longctx.model.modules import language_model

KINDS = sorted(kind for name in families() for kind in find_family(name).multimodal if kind in CONFIG_MAPPING_NAMES)
NEW = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(autouse=True)
def _eager_in_float64(monkeypatch):
    softmax_in_float64(monkeypatch)


@torch.no_grad()
def logits(model, prompt) -> torch.Tensor:
    return model(**prompt).logits


def everything(model) -> LongCtxConfig:
    return config_for(language_model(model), "retrieval")


@pytest.mark.parametrize("kind", KINDS)
def test_all_heads_retrieval_equals_eager_with_an_image(kind):
    model = model_with_images(kind)
    prompt = prompt_with_image(model)
    other = {**prompt, "pixel_values": -prompt["pixel_values"]}
    want, answer = logits(model, prompt), model.generate(**prompt, **NEW)
    assert (logits(model, other) - want).abs().max() > 1e-3  # the image is read
    patch_model(model, everything(model))
    assert (logits(model, prompt) - want).abs().max() < 1e-10
    got = model.generate(**prompt, **NEW, return_dict_in_generate=True)
    assert torch.equal(got.sequences, answer)
    assert isinstance(getattr(got, CACHE), LongCtxCache)


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_heads_change_what_it_answers(kind):
    """A control: the same model with windows shorter than the prompt."""
    model = model_with_images(kind)
    prompt = prompt_with_image(model)
    want = logits(model, prompt)
    patch_model(model, config_for(language_model(model), "streaming", sink=2, recent=6))
    assert (logits(model, prompt) - want).abs().max() > 1e-3
    assert report(model).retrieval_heads == 0


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_loaded_and_unpatched_as_a_whole(kind, tmp_path):
    model = model_with_images(kind)
    prompt = prompt_with_image(model)
    before, config, text = logits(model, prompt), model.config, language_model(model).config
    patch_model(model, config_for(language_model(model), "mixed", sink=2, recent=6))
    want = logits(model, prompt)
    assert model.config is not config and model.config.get_text_config().longctx is not None
    assert getattr(text, "longctx", None) is None and config.get_text_config() is text
    model.save_pretrained(tmp_path)
    again, dense = (
        hf_longctx.AutoModelForImageTextToText.from_pretrained(tmp_path, longctx=flag, dtype=torch.float64)
        for flag in (None, False)
    )
    for one in (again, dense):
        language_model(one).config._experts_implementation = "eager"  # grouped products know no float64
    assert torch.equal(logits(again, prompt), want)
    assert (logits(dense, prompt) - before).abs().max() < 1e-10
    unpatch_model(model)
    assert torch.equal(logits(model, prompt), before)
    assert model.config is config and language_model(model).config is text


def test_what_is_changed_on_either_config_stays():
    model = model_with_images("qwen2_vl")
    whole, text = model.config, model.config.text_config
    patch_model(model, everything(model))
    model.config.note_of_mine = "whole"
    model.config.text_config.note_of_mine = "text"
    assert not hasattr(whole, "note_of_mine") and not hasattr(text, "note_of_mine")
    unpatch_model(model)
    assert (whole.note_of_mine, text.note_of_mine) == ("whole", "text")


def test_the_vision_part_is_not_switched_to_our_attention(caplog):
    """And nothing says that it was, to somebody who switches the model to dense and back."""
    model = model_with_images("qwen2_vl")
    prompt = prompt_with_image(model)
    vision = model.config.vision_config
    patch_model(model, config_for(language_model(model), "mixed", sink=2, recent=6))
    want = logits(model, prompt)
    model.set_attn_implementation("sdpa")
    assert (logits(model, prompt) - want).abs().max() > 1e-3
    caplog.clear()
    model.set_attn_implementation("longctx")
    assert (logits(model, prompt) - want).abs().max() < 1e-10
    assert vision._attn_implementation == "sdpa" and not caplog.records
    unpatch_model(model)
    model.set_attn_implementation("eager")
    assert "set_attn_implementation" not in vars(model) and vision._attn_implementation == "eager"


def test_the_language_model_alone_is_patched_as_well():
    model = model_with_images("qwen2_vl")
    prompt = prompt_with_image(model)
    want = logits(model, prompt)
    patch_model(language_model(model), everything(model))
    assert (logits(model, prompt) - want).abs().max() < 1e-10
    unpatch_model(language_model(model))
    assert torch.equal(logits(model, prompt), want)


def test_the_whole_is_named_where_the_text_has_no_name():
    model = model_with_images("qwen2_vl")
    model.config._name_or_path = "me/mine"
    assert hf_longctx.model.modules.name_of(model) == "me/mine"


def test_image_tokens_that_see_each_other_are_refused_and_text_alone_is_not():
    model = model_with_images("gemma3")
    prompt = prompt_with_image(model)
    ids = torch.randint(3, 97, (2, 40))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    want = [logits(model, {"input_ids": one})[0] for one in (ids[:1], ids[1:, 9:])]
    patch_model(model, everything(model))
    with pytest.raises(UnsupportedModeError, match="masks of its own .*image see each other"):
        logits(model, prompt)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = logits(model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    assert (got[0] - want[0]).abs().max() < 1e-10 and (got[1, 9:] - want[1]).abs().max() < 1e-10


def test_positions_of_three_dimensions_are_refused_where_sequences_were_realigned():
    """The model counts them itself, from a cache in which it takes pads for tokens."""
    model = model_with_images("qwen2_vl")
    patch_model(model, everything(model))
    cache = LongCtxCache(model)
    prompt = prompt_with_image(model)
    with torch.no_grad():
        model(**prompt, **{CACHE: cache})
        cache.batch_repeat_interleave(2)
        cache.stagger([0, 3])
        mask = torch.ones(2, cache.seen + 1, dtype=torch.long)
        mask[1, :3] = 0
        with pytest.raises(UnsupportedModeError, match="several positions for each token"):
            model(prompt["input_ids"][:, :1].repeat(2, 1), attention_mask=mask, **{CACHE: cache})


OWN_POSITIONS = sorted({"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "qwen3_5"} & set(KINDS))


@pytest.mark.parametrize("kind", OWN_POSITIONS)
def test_a_cache_does_not_go_on_by_the_positions_of_another_prompt(kind, tmp_path):
    """The model keeps how far the image of the last prompt moves them."""
    model = model_with_images(kind)
    patch_model(model, everything(model))
    prompt = prompt_with_image(model)
    ids, more = torch.randint(3, 97, (1, 30)), torch.randint(3, 97, (1, 3))
    caches = LongCtxCache(model), LongCtxCache(model)
    went_on = []
    deltas = []
    for given, cache in zip(({"input_ids": ids}, prompt), caches, strict=True):
        model.model.rope_deltas = None
        logits(model, {**given, CACHE: cache})
        deltas.append(model.model.rope_deltas)
        went_on.append(logits(model, {"input_ids": more, CACHE: cache.fork()}))
    assert caches[0].ahead is None and caches[1].ahead == (int(deltas[1]),) and caches[1].ahead != (0,)
    caches[1].save(tmp_path / "image.safetensors", ids=prompt["input_ids"])
    loaded = LongCtxCache.load(tmp_path / "image.safetensors", model)
    for cache, own, other, want in (
        (caches[0], *deltas, went_on[0]),
        (caches[1], *reversed(deltas), went_on[1]),
        (loaded, *reversed(deltas), went_on[1]),
    ):
        cache.batch_repeat_interleave(2)
        twice = {"input_ids": more.repeat(2, 1), CACHE: cache}
        model.model.rope_deltas = other
        with pytest.raises(UnsupportedModeError, match="goes on at position .*rope_deltas"):
            logits(model, twice)
        model.model.rope_deltas = own
        assert (logits(model, twice) - want).abs().max() < 1e-10


def test_a_forged_number_of_positions_is_refused(tmp_path):
    model = model_with_images("qwen2_vl")
    patch_model(model, everything(model))
    prompt, cache = prompt_with_image(model), LongCtxCache(model)
    logits(model, {**prompt, CACHE: cache})
    cache.save(tmp_path / "true.safetensors", ids=prompt["input_ids"])
    forger = Forger(tmp_path / "true.safetensors")
    refused = 0
    for what, edit in forger.every():
        if AHEAD in what:
            try:
                ahead = LongCtxCache.load(forger.write(tmp_path / "forged.safetensors", edit), model).ahead
            except CacheError:
                refused += 1
            else:  # another number of positions is as good as this one
                assert type(ahead[0]) is int and -40 <= ahead[0] < 2**40 and len(ahead) == 1, what
    assert refused > 10


@pytest.mark.parametrize("kind", ["qwen2_vl"])
def test_a_prompt_of_text_is_not_asked_by_the_positions_of_an_image(kind):
    model = model_with_images(kind)
    patch_model(model, everything(model))
    ids, more = torch.randint(3, 97, (30,)), torch.randint(3, 97, (3,))
    prompt = PromptCache(model).prefill(ids)
    want = prompt.generate(more, **NEW)
    model.generate(**prompt_with_image(model), **NEW)
    with pytest.raises(UnsupportedModeError, match="goes on at position 29, and this forward at 26"):
        prompt.generate(more, **NEW)
    model.model.rope_deltas = None
    assert prompt.generate(more, **NEW) == want


def test_chunks_pads_and_turns_of_one_prompt_go_on():
    """With an image in each sequence, of which one is padded; a second turn and a chunk that ends in an image."""
    model = model_with_images("qwen2_vl")
    prompts = [prompt_with_image(model, seed=seed) for seed in (0, 1)]
    batch = {name: torch.cat([one[name] for one in prompts]) for name in prompts[0]}
    for name in ("input_ids", "mm_token_type_ids"):
        batch[name][1] = torch.nn.functional.pad(batch[name][1], (5, 0))[:40]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, :5] = 0
    model.set_attn_implementation("sdpa")
    wants = [model.generate(**batch, **NEW, prefill_chunk_size=size) for size in (None, 10)]
    patch_model(model, everything(model))
    for size, want in zip((None, 10), wants, strict=True):
        cache = LongCtxCache(model)
        got = model.generate(**batch, **NEW, prefill_chunk_size=size, **{CACHE: cache})
        assert torch.equal(got, want) and cache.ahead == (-3, -3)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 6, dtype=torch.long)], 1)
    turn = model.generate(got, attention_mask=mask, **NEW, **{CACHE: cache})
    assert turn.shape == (2, 52)


def test_text_alone_is_realigned_as_with_a_model_of_text():
    model = model_with_images("qwen2_vl")
    patch_model(model, everything(model))
    cache = LongCtxCache(model)
    ids, more = torch.randint(3, 97, (2, 30)), torch.randint(3, 97, (2, 1))
    mask = torch.ones(2, 31, dtype=torch.long)
    mask[1, :3] = 0
    with torch.no_grad():
        model(ids, **{CACHE: cache})
        cache.stagger([0, 3])
        got = model(more, attention_mask=mask, **{CACHE: cache}).logits[:, -1]
        alone = [torch.cat([ids[:1], more[:1]], 1), torch.cat([ids[1:, :27], more[1:]], 1)]
        want = torch.cat([model(one, use_cache=False).logits[:, -1] for one in alone])
    assert (got - want).abs().max() < 1e-10


def test_the_stock_class_loads_it_dense(tmp_path):
    model = model_with_images("qwen2_vl")
    patch_model(model, everything(model))
    model.save_pretrained(tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert hf_longctx.model.modules.state_of(plain) is None
    assert AutoConfig.from_pretrained(tmp_path).text_config.longctx is not None
