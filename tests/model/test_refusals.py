"""What a patched model refuses: the right error, before any layer writes a token, and the model works afterwards."""

from __future__ import annotations

import pytest
import torch
from helpers.store_cases import CASES, case_config
from helpers.tiny import FAMILIES, config_for, left_padded, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, StaticCache

from hf_longctx import CacheError, ConfigError, LongCtxCache, UnsupportedModeError, UnsupportedModelError, patch_model


@pytest.fixture(params=[*FAMILIES, *(f"llama {case}" for case in CASES)])
def model(request):
    """Every family, and every store."""
    family, _, case = request.param.partition(" ")
    model = tiny_model(family)
    return patch_model(model, case_config(model, case) if case else config_for(model, "mixed"))


IDS = torch.arange(3, 43)[None]


def refuse(model, error, match: str, call, cache=None) -> None:
    """``call`` raises, writes nothing, and the model gives the tokens it gave before."""
    want = model.generate(input_ids=IDS, max_new_tokens=3)
    seen = None if cache is None else [layer.seen for layer in cache.layers]
    with pytest.raises(error, match=match):
        call()
    assert cache is None or [layer.seen for layer in cache.layers] == seen
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=3), want)


def test_static_caches(model):
    asked = {"input_ids": IDS, "max_new_tokens": 3, "cache_implementation": "static"}
    refuse(model, UnsupportedModeError, "static.*LongCtxCache", lambda: model.generate(**asked))
    cache = StaticCache(config=model.config, max_cache_len=64)
    refuse(model, UnsupportedModeError, "StaticCache is a static cache", lambda: model(IDS, past_key_values=cache))


def test_packed_sequences(model):
    packed = torch.cat([torch.arange(25), torch.arange(15)])[None]
    for more in ({"use_cache": False}, {}):
        refuse(model, UnsupportedModeError, "packed", lambda more=more: model(IDS, position_ids=packed, **more))
    lengths = torch.tensor([0, 25, 40], dtype=torch.int32)
    refuse(
        model, UnsupportedModeError, "cu_seq_lens_q", lambda: model(IDS, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)
    )


def test_masks_with_four_dimensions_and_holes(model):
    four = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    refuse(model, UnsupportedModeError, r"\(1, 1, 40, 40\).*2D", lambda: model(IDS, attention_mask=four))
    hole = torch.ones(1, 40, dtype=torch.long)
    hole[0, 7] = 0
    refuse(model, UnsupportedModeError, "holes: row 0 has 39 real tokens", lambda: model(IDS, attention_mask=hole))
    short = torch.ones(1, 30, dtype=torch.long)
    refuse(model, UnsupportedModeError, r"shape \(1, 30\)", lambda: model(IDS, attention_mask=short))


@torch.no_grad()
def test_a_hole_that_opens_while_decoding(model):
    cache = LongCtxCache(model)
    model(IDS, past_key_values=cache)
    mask = torch.ones(1, 41, dtype=torch.long)
    mask[0, 5] = 0
    refuse(
        model,
        UnsupportedModeError,
        "holes",
        lambda: model(IDS[:, :1], attention_mask=mask, past_key_values=cache),
        cache,
    )
    mask[0, :6] = 0
    step = {"attention_mask": mask, "past_key_values": cache}
    refuse(model, CacheError, "starts at token 0, this forward says 6", lambda: model(IDS[:, :1], **step), cache)


@torch.no_grad()
def test_a_padded_cache_needs_its_mask(model):
    ids, mask = left_padded([20, 5])
    cache = LongCtxCache(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    match = "row 1 of the cache starts at token 15, this forward has no attention_mask. Pass the attention_mask"
    refuse(model, CacheError, match, lambda: model(ids[:, :1], past_key_values=cache), cache)
    swapped = torch.cat([mask.flip(0), torch.ones(2, 1, dtype=mask.dtype)], 1)
    step = {"attention_mask": swapped, "past_key_values": cache}
    match = "row 0 of the cache starts at token 0, this forward says 15 in its attention_mask"
    refuse(model, CacheError, match, lambda: model(ids[:, :1], **step), cache)


@torch.no_grad()
def test_a_right_padded_cache_cannot_be_continued(model):
    ids, mask = left_padded([20, 5])
    ids, mask = ids.flip(1), mask.flip(1)
    cache = LongCtxCache(model)
    out = model(ids, attention_mask=mask, past_key_values=cache).logits
    alone = model(ids[1:, :5]).logits
    torch.testing.assert_close(out[1:, :5], alone)
    longer = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    step = {"attention_mask": longer, "past_key_values": cache}
    refuse(model, UnsupportedModeError, "holes", lambda: model(ids[:, :1], **step), cache)
    refuse(model, CacheError, "right-padded", lambda: model(ids[:, :1], past_key_values=cache), cache)


def test_output_attentions(model):
    refuse(model, UnsupportedModeError, "observe", lambda: model(IDS, output_attentions=True))
    asked = {"output_attentions": True, "return_dict_in_generate": True}
    refuse(model, UnsupportedModeError, "observe", lambda: model.generate(input_ids=IDS, max_new_tokens=2, **asked))


@torch.no_grad()
def test_crop_beyond_the_slack(model):
    cache = LongCtxCache(model)
    model(torch.randint(3, 97, (1, 400)), past_key_values=cache)
    before = cache.nbytes
    refuse(model, CacheError, "cannot crop from 400 to 100", lambda: cache.crop(-300), cache)
    assert cache.nbytes == before
    cache.crop(-200)
    assert cache.get_seq_length() == 200
    refuse(model, CacheError, "cannot crop", lambda: cache.crop(-100), cache)


@torch.no_grad()
def test_an_interrupted_forward_is_noticed_and_can_be_mended(model):
    text = torch.randint(3, 97, (1, 60))
    cache, whole = LongCtxCache(model), LongCtxCache(model)
    for one in (cache, whole):
        model(text[:, :50], past_key_values=one)
    want = model(text[:, 50:], past_key_values=whole).logits[:, -1]
    layer = model.base_model.layers[1]
    handle = layer.mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(text[:, 50:], past_key_values=cache)
    handle.remove()
    refuse(model, CacheError, "interrupted", lambda: model(text[:, 50:], past_key_values=cache), cache)
    cache.crop(0)
    torch.testing.assert_close(model(text[:, 50:], past_key_values=cache).logits[:, -1], want)
    cache.reset()
    torch.testing.assert_close(model(text, past_key_values=cache).logits, model(text).logits)


@torch.no_grad()
def test_max_tokens_is_a_hard_limit(model):
    cache = LongCtxCache(model, max_tokens=45)
    model(IDS, past_key_values=cache)
    refuse(model, CacheError, "max_tokens=45", lambda: model(IDS[:, :6], past_key_values=cache), cache)
    with pytest.raises(CacheError, match="positive"):
        LongCtxCache(model, max_tokens=0)


@torch.no_grad()
def test_another_batch_size(model):
    cache = LongCtxCache(model)
    model(IDS, past_key_values=cache)
    many = {rows: IDS[:, :2].expand(rows, -1) for rows in (2, 3, 4)}
    match = r"holds 1 rows, the forward brings 2. Use a new cache or.*batch_repeat_interleave\(2\) before"
    refuse(model, CacheError, match, lambda: model(many[2], past_key_values=cache), cache)
    cache.batch_repeat_interleave(2)
    refuse(model, CacheError, "brings 3. Use a new cache.$", lambda: model(many[3], past_key_values=cache), cache)
    cache.batch_repeat_interleave(2)
    assert model(many[4], past_key_values=cache).logits.shape[0] == 4


def test_positions_that_skip_or_repeat(model):
    """Not those of packed sequences, which go back."""
    skips, pads = torch.arange(40), torch.cat([torch.zeros(9, dtype=torch.long), torch.arange(31)])
    skips[20:] += 5
    match = "25 follows 19 in row 0.*leave position_ids out"
    refuse(model, UnsupportedModeError, match, lambda: model(IDS, position_ids=skips[None]))
    refuse(model, UnsupportedModeError, "0 follows 0 in row 0.*pads", lambda: model(IDS, position_ids=pads[None]))
    mask = torch.ones_like(IDS)
    mask[0, :9] = 0
    assert model(IDS, position_ids=pads[None], attention_mask=mask).logits.shape == (1, 40, 97), "what it says to do"


def test_a_mask_that_the_model_itself_makes(model):
    attention = model.base_model.layers[1].self_attn
    four = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    handle = attention.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": four}), with_kwargs=True
    )
    with pytest.raises(UnsupportedModeError, match=r"made a mask of shape \(1, 1, 40, 40\) of its own for layer 1"):
        model(IDS)
    handle.remove()
    attention.train().attention_dropout = 0.5
    with pytest.raises(UnsupportedModeError, match="layer 1 asks for dropout 0.5"):
        model(IDS, use_cache=False)


def test_a_switched_model_runs_dense_and_refuses_our_cache(model, caplog):
    cache = LongCtxCache(model)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedModeError, match="'sdpa' and runs dense"):
        model(IDS[:, :1], past_key_values=cache)
    assert model.generate(input_ids=IDS, max_new_tokens=2).shape == (1, 42)
    assert caplog.text.count("longctx is off") == 1
    model.set_attn_implementation("longctx")
    assert isinstance(model(IDS).past_key_values, LongCtxCache)


def test_gradients_through_a_kept_token_are_refused(model):
    cache = LongCtxCache(model)
    model(IDS, past_key_values=cache).logits.sum().backward()
    loss = model(IDS[:, :1], past_key_values=cache).logits.sum()
    refuse(model, UnsupportedModeError, "gradients do not flow", loss.backward)


def test_an_attention_module_on_its_own(model):
    attention = model.base_model.layers[0].self_attn
    states = torch.randn(1, 4, model.config.hidden_size)
    cos = torch.randn(1, 4, 8)
    refuse(
        model,
        UnsupportedModeError,
        "without its base model.s forward hooks",
        lambda: attention(states, (cos, cos), None),
    )


def test_dropout_and_continuous_batching():
    model = AutoModelForCausalLM.from_config(tiny_config("llama", attention_dropout=0.5), attn_implementation="sdpa")
    patch_model(model, config_for(model, "mixed")).train()
    with pytest.raises(UnsupportedModeError, match="dropout"):
        model(IDS)
    assert model.eval()(IDS).logits.shape == (1, 40, 97)


def test_other_families():
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11))
    with pytest.raises(UnsupportedModelError, match="'gpt2' is not supported yet") as caught:
        patch_model(gpt2)
    assert "FAMILY = Family('gpt2', layers='h', attention='attn'" in str(caught.value)
    assert gpt2.generate(input_ids=torch.tensor([[1, 2]]), max_new_tokens=1).shape == (1, 3)
    with pytest.raises(UnsupportedModelError, match="Linear is no Transformers model"):
        patch_model(torch.nn.Linear(2, 2))


def test_a_config_for_another_shape():
    model, other = tiny_model("llama"), tiny_model("llama", kv_heads=2)
    want = model.generate(input_ids=IDS, max_new_tokens=3)
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        patch_model(model, config_for(other, "mixed"))
    with pytest.raises(ConfigError, match="model_type"):
        patch_model(model, config_for(tiny_model("qwen3"), "mixed"))
    with pytest.raises(ConfigError, match="identify|made for|heads"):
        patch_model(model, "auto")
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=3), want)
    with pytest.raises(UnsupportedModelError, match="patch_model"):
        LongCtxCache(model)


@torch.no_grad()
def test_a_cache_of_another_config_or_of_no_patch(model):
    cache = LongCtxCache(model)
    model(IDS, past_key_values=cache)
    family = model.config.model_type
    other = patch_model(tiny_model(family), config_for(model, "streaming"))
    match = "another config .other roles"
    refuse(other, CacheError, match, lambda: other(IDS[:, :1], past_key_values=cache), cache)
    patch_model(model, "auto", kernel="reference")
    match = "another config .other kernel.. Start with a new cache"
    refuse(model, CacheError, match, lambda: model(IDS[:, :1], past_key_values=cache), cache)
    with pytest.raises(UnsupportedModeError, match="not the patched one"):
        tiny_model(family)(IDS[:, :1], past_key_values=cache)
