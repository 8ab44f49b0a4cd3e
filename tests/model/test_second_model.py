"""A second model made from the config, or the attention word, of a patched one: it runs as stock, bit for bit."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers
from helpers.tiny import SLIDING, config_for, left_padded, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

import hf_longctx
from hf_longctx import LongCtxCache, UnsupportedModeError, UnsupportedModelError, patch_model, report, unpatch_model

IDS = torch.arange(3, 43)[None]
SHAPES = [("llama", None), *((family, 9) for family in SLIDING)]  # the second ones with sliding windows


def patched_and_back(policy, folder):
    second = AutoModelForCausalLM.from_config(policy.config)
    return unpatch_model(patch_model(second))


# How other code makes the second model: by the word (TRL), by the config, by the class.
WAYS = {
    "the word": lambda policy, folder: AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=policy.config._attn_implementation
    ),
    "the config": lambda policy, folder: AutoModelForCausalLM.from_pretrained(folder, config=policy.config),
    "a copied config": lambda policy, folder: type(policy).from_pretrained(folder, config=copy.copy(policy.config)),
    "the class": lambda policy, folder: type(policy)(policy.config),
    "from_config": lambda policy, folder: AutoModelForCausalLM.from_config(policy.config),
    "the word in from_config": lambda policy, folder: AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), attn_implementation=policy.config._attn_implementation
    ),
    "patched and back": patched_and_back,
}


@pytest.fixture(params=SHAPES, ids=str)
def trio(request, tmp_path):
    """(stock, policy, folder) of the same weights, the policy patched."""
    family, window = request.param
    torch.manual_seed(1)
    stock = tiny_model(family, sliding=window)
    stock.save_pretrained(tmp_path)
    policy = patch_model(copy.deepcopy(stock), config_for(stock, "mixed", sink=1, recent=5))
    assert not torch.equal(policy(IDS).logits, stock(IDS).logits)
    return stock, policy, tmp_path


def made(way: str, stock, policy, folder):
    second = WAYS[way](policy, folder).eval()
    second.load_state_dict(stock.state_dict())
    second.generation_config = stock.generation_config
    return second


def packed(model):
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]
    return model(IDS, position_ids=positions, use_cache=False).logits


def in_chunks(model):
    """No chunk of one token: on some CPUs its rounding depends on where the weights lie in memory."""
    cache = DynamicCache(config=model.config)
    return torch.cat([model(piece, past_key_values=cache).logits for piece in IDS.split(12, 1)], 1)


def static(model):
    cache = StaticCache(config=model.config, max_cache_len=64)
    return model.generate(IDS, max_new_tokens=4, past_key_values=cache)


def four(model):
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    mask[..., 3] = False
    mask[..., 3, 3] = True
    return model(IDS, attention_mask=mask).logits


def training(model):
    model.train().zero_grad()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    return model.eval().base_model.layers[0].self_attn.k_proj.weight.grad


PADDED, MASK = left_padded([40, 11, 2])
CALLS = {
    "plain": lambda model: model(IDS).logits,
    "left pads": lambda model: model(PADDED, attention_mask=MASK).logits,
    "right pads": lambda model: model(PADDED.flip(1), attention_mask=MASK.flip(1)).logits,
    "holes": lambda model: model(IDS, attention_mask=(IDS % 5 != 0).long()).logits,
    "4D mask": four,
    "packed": packed,
    "chunks": in_chunks,
    "generate": lambda model: model.generate(PADDED, attention_mask=MASK, max_new_tokens=6),
    "beams": lambda model: model.generate(PADDED, attention_mask=MASK, max_new_tokens=6, num_beams=3),
    "static cache": static,
    "training": training,
}


def test_it_runs_as_stock(trio):
    stock, policy, folder = trio
    before = policy(IDS).logits
    want = {name: call(stock) for name, call in CALLS.items()}
    second = None
    for way in WAYS:
        whole = way in ("the word", "the class")  # a config of its own, and that of the policy: the two ends
        second = made(way, stock, policy, folder)
        for name in CALLS if whole else ("left pads", "chunks"):
            assert torch.equal(CALLS[name](second), want[name]), f"{way}, {name}"
    assert type(second(IDS).past_key_values) is DynamicCache
    assert torch.equal(policy(IDS).logits, before), "the policy is as it was"
    assert isinstance(policy(IDS).past_key_values, LongCtxCache)


@pytest.fixture
def pair(tmp_path):
    stock = tiny_model()
    stock.save_pretrained(tmp_path)
    return patch_model(copy.deepcopy(stock), config_for(stock)), stock, tmp_path


@pytest.mark.parametrize("way", WAYS)
def test_it_says_once_that_it_is_not_patched(pair, way, caplog):
    policy, stock, folder = pair
    second = made(way, stock, policy, folder)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            second(IDS)
    assert caplog.text.count("is not patched was given the attention 'longctx'") == 1
    for call in (report, LongCtxCache):
        with pytest.raises(UnsupportedModelError, match="patch_model"):
            call(second)
    with pytest.raises(UnsupportedModeError, match="not the patched one"):
        second(IDS[:, :1], past_key_values=policy(IDS).past_key_values)


@pytest.mark.parametrize("way", WAYS)
def test_it_can_be_patched_and_unpatched(pair, way):
    policy, stock, folder = pair
    second = made(way, stock, policy, folder)
    patch_model(second, config_for(stock))
    assert torch.equal(second(IDS).logits, policy(IDS).logits)
    unpatch_model(second)
    assert torch.equal(second(IDS).logits, stock(IDS).logits)
    unpatch_model(policy)
    assert torch.equal(policy(IDS).logits, stock(IDS).logits)
    assert policy.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("way", WAYS)
def test_it_is_saved_as_an_ordinary_checkpoint(pair, way, tmp_path):
    policy, stock, folder = pair
    made(way, stock, policy, folder).save_pretrained(tmp_path / "second")
    assert '"_attn_implementation"' not in (tmp_path / "second" / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert torch.equal(again(IDS).logits, stock(IDS).logits)
    assert again.config._attn_implementation == "sdpa"


def test_the_base_model_from_the_config(pair):
    policy, stock, folder = pair
    second = AutoModel.from_config(policy.config).eval()
    second.load_state_dict(stock.base_model.state_dict())
    assert torch.equal(second(IDS).last_hidden_state, stock.base_model(IDS).last_hidden_state)


def test_a_deep_copy_stays_patched(pair):
    policy, stock, folder = pair
    twin = copy.deepcopy(policy)
    assert torch.equal(twin(IDS).logits, policy(IDS).logits)
    assert isinstance(twin(IDS).past_key_values, LongCtxCache)
    second = type(twin)(twin.config).eval()
    second.load_state_dict(stock.state_dict())
    assert torch.equal(second(PADDED, attention_mask=MASK).logits, stock(PADDED, attention_mask=MASK).logits)


@pytest.mark.parametrize("ours", [True, False], ids=["our class", "install()"])
def test_the_flag_in_a_copied_config_patches(pair, ours):
    policy, stock, folder = pair
    if ours:
        second = hf_longctx.AutoModelForCausalLM.from_pretrained(folder, config=policy.config)
    else:
        hf_longctx.install()
        try:
            second = transformers.AutoModelForCausalLM.from_pretrained(folder, config=policy.config)
        finally:
            hf_longctx.uninstall()
    assert torch.equal(second(IDS).logits, policy(IDS).logits)
    assert isinstance(second(IDS).past_key_values, LongCtxCache)
    assert second.config is not policy.config


def test_switching_the_second_model_to_another_attention(pair):
    policy, stock, folder = pair
    second = made("the config", stock, policy, folder)
    second.set_attn_implementation("eager")
    stock.set_attn_implementation("eager")
    assert torch.equal(second(PADDED, attention_mask=MASK).logits, stock(PADDED, attention_mask=MASK).logits)
    assert isinstance(policy(IDS).past_key_values, LongCtxCache), "its config is a copy"


@pytest.mark.parametrize("name", ["s_aux", "softcap"])
def test_what_sdpa_does_not_compute_is_refused(pair, name):
    policy, stock, folder = pair
    second = made("the word", stock, policy, folder)
    with pytest.raises(UnsupportedModeError, match=f"does not compute {name}.*attn_implementation='eager'"):
        second(IDS, **{name: torch.ones(8)})


def test_a_module_that_came_after_patching_is_refused(pair):
    policy, stock, folder = pair
    policy.base_model.layers[1].self_attn = copy.deepcopy(stock.base_model.layers[1].self_attn)
    policy.base_model.layers[1].self_attn.config = policy.config
    with pytest.raises(UnsupportedModeError, match="put into the model after patch_model"):
        policy(IDS)


def test_the_calls_of_preference_training(pair):
    """What TRL's DPOTrainer and GRPOTrainer (beta > 0) do for their reference model, in its words (TRL 1.16)."""
    policy, stock, folder = pair
    arguments = {"device_map": None, "dtype": policy.dtype, "attn_implementation": policy.config._attn_implementation}
    reference = transformers.AutoModelForCausalLM.from_pretrained(str(folder), **arguments)
    for parameter in reference.parameters():
        parameter.requires_grad_(False)
    reference.eval()
    policy.train()
    with torch.no_grad():
        want = reference(PADDED, attention_mask=MASK, use_cache=False).logits.log_softmax(-1)
    assert torch.equal(want, stock(PADDED, attention_mask=MASK, use_cache=False).logits.log_softmax(-1))
    got = policy(PADDED, attention_mask=MASK, use_cache=False).logits.log_softmax(-1)
    (got - want)[MASK.bool()].square().mean().backward()
    assert policy.base_model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0
