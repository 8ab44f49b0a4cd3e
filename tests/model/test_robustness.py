"""Ways a model and its cache are handled that once went wrong, or would be easy to get wrong."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import config_for, left_padded, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_longctx import (
    CacheError,
    ConfigError,
    LongCtxCache,
    LongCtxConfig,
    UnsupportedModeError,
    patch_model,
    patched,
    unpatch_model,
)
from hf_longctx.stores.sink_recent import SinkRecentStore

IDS = torch.arange(3, 43)[None]


def patched_tiny(family="llama", roles="mixed", sink=4, recent=16, **kwargs):
    model = tiny_model(family, torch.float64, **kwargs)
    return patch_model(model, config_for(model, roles, sink, recent))


@pytest.mark.parametrize("roles", ["retrieval", "streaming", "mixed"])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_of_a_single_token_reach_keys_and_values(roles, padded):
    model = tiny_model("llama", torch.float64)
    ids, mask = (torch.tensor([[5], [6]]), torch.tensor([[1], [0]])) if padded else (torch.tensor([[5]]), None)

    def gradient():
        model.zero_grad()
        model(ids, attention_mask=mask).logits[:1].square().sum().backward()
        return model.base_model.layers[0].self_attn.v_proj.weight.grad.clone()

    want = gradient()
    with patched(model, config_for(model, roles)):
        torch.testing.assert_close(gradient(), want, rtol=0, atol=1e-9)
    assert want.abs().max() > 1e-3


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_an_interrupt_inside_a_write_is_never_continued(layer, monkeypatch):
    model = patched_tiny()
    cache = LongCtxCache(model)
    model(IDS, past_key_values=cache)
    write, calls = SinkRecentStore._write, []

    def interrupted(self, *args):
        write(self, *args)
        calls.append(self)
        if len(calls) == layer + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(SinkRecentStore, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(IDS[:, :9], past_key_values=cache)
    monkeypatch.undo()
    with pytest.raises(CacheError, match="interrupted"):
        model(IDS[:, :1], past_key_values=cache)
    with pytest.raises(CacheError, match="interrupted while it was written"):
        cache.crop(0)
    cache.reset()
    torch.testing.assert_close(model(IDS, past_key_values=cache).logits, model(IDS).logits)


@pytest.mark.parametrize("roles", ["retrieval", "mixed"])
def test_autocast_in_every_phase(roles):
    model = tiny_model("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = [model.generate(IDS, max_new_tokens=6, **mode) for mode in ({}, {"prefill_chunk_size": 16})]
    patch_model(model, config_for(model, roles))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = [model.generate(IDS, max_new_tokens=6, **mode) for mode in ({}, {"prefill_chunk_size": 16})]
        kept = model(IDS).past_key_values
    assert {tensor.dtype for layer in kept.layers for tensor in layer.tensors()} == {torch.bfloat16}
    assert torch.isfinite(model(IDS[:, :1], past_key_values=kept).logits).all()
    assert got[0].shape == want[0].shape
    if roles == "retrieval":
        assert torch.equal(got[0], want[0])


def test_edits_of_the_config_survive_unpatching(tmp_path):
    model = tiny_model()
    patch_model(model, config_for(model, "mixed"))
    model.resize_token_embeddings(120)
    model.config.pad_token_id = 9
    with patched(model, config_for(model, "streaming")):
        assert model.config.pad_token_id == 9
        model.config.use_cache = False
    assert (model.config.use_cache, model.config.longctx["heads"]["roles"][0]) == (False, "RSRS")
    assert (model.config.vocab_size, model.config.pad_token_id) == (120, 9)
    unpatch_model(model)
    assert (model.config.vocab_size, model.config.pad_token_id) == (120, 9)
    assert not hasattr(model.config, "longctx")
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 120


def test_patching_through_a_part_of_the_model_is_patching_the_model():
    model = tiny_model()
    own = model.config
    patch_model(model, config_for(model, "mixed"))
    patch_model(model.model, config_for(model, "streaming"))
    assert model.config is model.model.config
    assert model.config.longctx["heads"]["roles"] == ["SSSS"] * 3
    assert isinstance(model.generate(IDS, max_new_tokens=2, return_dict_in_generate=True).past_key_values, LongCtxCache)
    unpatch_model(model.model)
    assert model.config is own
    assert model.generate(IDS, max_new_tokens=2).shape == (1, 42)
    assert "_prepare_cache_for_generation" not in vars(model)


@pytest.mark.parametrize("change", ["reorder", "repeat", "select"])
def test_a_cache_leaves_inference_mode(change):
    model = patched_tiny()
    with torch.inference_mode():
        cache = model(IDS.expand(2, -1)).past_key_values
        if change == "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
        elif change == "repeat":
            cache.batch_repeat_interleave(1)
        else:
            cache.batch_select_indices(torch.tensor([0, 1]))
    with torch.no_grad():
        got = model(torch.tensor([[4], [4]]), past_key_values=cache).logits
        want = model(torch.cat([IDS, torch.tensor([[4]])], 1)).logits[:, -1:]
    torch.testing.assert_close(got, want.expand(2, -1, -1), rtol=0, atol=1e-6)


def test_early_exit_drafting():
    model = tiny_model()
    text = torch.cat([IDS, IDS[:, :20]], 1)
    want = model.generate(text, max_new_tokens=12)
    with patched(model, config_for(model, "retrieval")):
        assert torch.equal(model.generate(text, max_new_tokens=12, assistant_early_exit=2), want)
    with patched(model, config_for(model, "mixed")):
        plain = model.generate(text, max_new_tokens=12)
        assert torch.equal(model.generate(text, max_new_tokens=12, assistant_early_exit=2), plain)


@pytest.mark.parametrize("patch_first", [True, False])
def test_peft_copies_of_the_attention_module(patch_first):
    torch.manual_seed(5)
    model = tiny_model()
    want = model.generate(IDS, max_new_tokens=5)
    config = config_for(model, "retrieval")
    lora = LoraConfig(r=2, target_modules=["gate_proj"], modules_to_save=["self_attn"])
    if patch_first:
        wrapped = get_peft_model(patch_model(model, config), lora)
    else:
        wrapped = patch_model(get_peft_model(model, lora), config)
    out = wrapped.eval().generate(input_ids=IDS, max_new_tokens=5, return_dict_in_generate=True)
    assert torch.equal(out.sequences, want)
    assert isinstance(out.past_key_values, LongCtxCache)
    unpatch_model(wrapped)
    assert torch.equal(wrapped.generate(input_ids=IDS, max_new_tokens=5), want)


@torch.no_grad()
def test_right_pads_that_are_gone_are_forgotten():
    model = patched_tiny()
    ids, mask = (t.flip(1) for t in left_padded([40, 30]))
    cache = LongCtxCache(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([0]))
    got = model(IDS[:, :2], past_key_values=cache).logits
    torch.testing.assert_close(got, model(torch.cat([ids[:1], IDS[:, :2]], 1)).logits[:, -2:], rtol=0, atol=1e-6)

    cache = LongCtxCache(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.crop(-10)
    got = model(IDS[:, :2].expand(2, -1), past_key_values=cache).logits
    want = model(torch.cat([ids[:, :30], IDS[:, :2].expand(2, -1)], 1)).logits[:, -2:]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_forward_that_fails_before_the_first_layer_leaves_the_cache_as_it_was():
    model = patched_tiny()
    ids, mask = left_padded([20, 5])
    cache = LongCtxCache(model)
    with pytest.raises(IndexError):
        model(ids + 1000, attention_mask=mask, past_key_values=cache)
    want = model(IDS).logits
    torch.testing.assert_close(model(IDS, past_key_values=cache).logits, want)
    longer = torch.ones(1, 50)
    longer[:, -2:] = 0
    with pytest.raises(IndexError):
        model(IDS[:, :10] + 1000, attention_mask=longer, past_key_values=cache)
    got = model(IDS[:, :1], past_key_values=cache).logits
    torch.testing.assert_close(got, model(torch.cat([IDS, IDS[:, :1]], 1)).logits[:, -1:], rtol=0, atol=1e-6)


@torch.no_grad()
def test_memory_follows_a_crop_back():
    model = patched_tiny(recent=40)
    cache = LongCtxCache(model)
    text = torch.randint(3, 97, (1, 6000))
    model(text, past_key_values=cache, logits_to_keep=1)
    cache.crop(-200)
    assert cache.forward is None
    model(text[:, :1], past_key_values=cache)
    for layer in cache.layers:
        full = layer.stores[0].segments["kept"]
        assert full.length == 5801
        assert full.k.shape[2] <= 5801 + 5801 // 8

    short = LongCtxCache(model)
    model(text[:, :60], past_key_values=short)
    short.crop(-30)
    model(text[:, 30:50], past_key_values=short)
    assert all("history" not in store.segments for layer in short.layers for store in layer.stores) is False
    short.crop(-20)
    assert all("history" not in store.segments for layer in short.layers for store in layer.stores)
    got = model(text[:, 30:90], past_key_values=short).logits
    torch.testing.assert_close(got, model(text[:, :90]).logits[:, -60:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_window_changed_after_patching_is_refused(family):
    model = tiny_model(family, sliding=9)
    patch_model(model, config_for(model, "mixed"))
    if family == "mistral":
        model.config.sliding_window = None
    else:
        model.base_model.layers[1].self_attn.sliding_window = 5
    with pytest.raises(UnsupportedModeError, match="patched with 9"):
        model(IDS)


def test_odd_arguments():
    model = patched_tiny()
    for wrong in (100.0, True, "9", -1):
        with pytest.raises(CacheError, match="whole number"):
            LongCtxCache(model, max_tokens=wrong)
    assert LongCtxCache(model, max_tokens=7).max_cache_len == 7
    seen = []
    model.base_model.register_forward_hook(lambda module, args, out: seen.append(len(args)))
    model.base_model(IDS)
    assert seen == [1]


def test_dropout_is_refused_before_a_layer_writes():
    model = AutoModelForCausalLM.from_config(tiny_config("llama", attention_dropout=0.5), attn_implementation="sdpa")
    patch_model(model, config_for(model, "mixed")).train()
    cache = LongCtxCache(model)
    with pytest.raises(UnsupportedModeError, match="attention_dropout=0.5"):
        model(IDS, past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_yaml_aliases_are_refused(tmp_path):
    model = tiny_model()
    path = tmp_path / "bomb.yaml"
    config_for(model, "mixed").to_yaml(path)
    path.write_text(path.read_text() + "\nextra: &a [1, 2]\nmore: [*a, *a]\n")
    with pytest.raises(ConfigError, match="aliases"):
        LongCtxConfig.from_yaml(path)
