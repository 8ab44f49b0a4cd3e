"""What Transformers itself answers wrongly, or lets pass unread: refused on every way in, before a layer writes."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import pickle
import sys

import pytest
import torch
from helpers.tiny import FAMILIES, config_for, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.loss.loss_utils import ForCausalLMLoss

import hf_longctx.model.patch
from hf_longctx import LongCtxCache, UnsupportedModeError, UnsupportedModelError, patch_model, report, unpatch_model
from hf_longctx.cache.seam import CACHE, checkpointing_drops_cache
from hf_longctx.model import batched
from hf_longctx.model.attention import KNOWN, UNUSED
from hf_longctx.model.family import Family
from hf_longctx.model.rotary import BY_LENGTH, length_limit

IDS = torch.arange(3, 43)[None]
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def patched_tiny(roles="mixed", **kwargs):
    model = tiny_model(**kwargs)
    return patch_model(model, config_for(model, roles))


# Keywords of the attention function


ASKS = {
    "softcap": ("gemma2", {"query_pre_attn_scalar": 8, "sliding_window": 16}, "layer_types"),
    "s_aux": ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 16}, "layer_types"),
}


@pytest.mark.parametrize("asked", ASKS)
def test_a_family_that_asks_for_more_is_refused_at_its_first_forward(asked, monkeypatch):
    model_type, extra, sliding = ASKS[asked]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **HEADS, **extra)).eval()
    monkeypatch.setattr(hf_longctx.model.patch, "find_family", lambda name: Family(name, sliding=sliding))
    patch_model(model, config_for(model, "retrieval"))
    for call in (
        lambda: model(IDS),
        lambda: model(IDS, use_cache=False),
        lambda: model.generate(IDS, max_new_tokens=1),
    ):
        with pytest.raises(UnsupportedModelError, match=f"asks its attention function for {asked}"):
            call()


def test_a_family_without_that_projection_is_told_which_there_are(monkeypatch):
    config = AutoConfig.for_model("phi3", **SIZES, **HEADS)
    model = AutoModelForCausalLM.from_config(config).eval()
    monkeypatch.setattr(hf_longctx.model.patch, "find_family", Family)
    with pytest.raises(UnsupportedModelError, match="no 'k_proj'; it has .*qkv_proj.*key_projection in patches/phi3"):
        patch_model(model, config_for(model, "retrieval"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_ask_for_nothing_else(family, monkeypatch):
    seen = set()
    attend = hf_longctx.model.attention.attend

    def watched(*args, **kwargs):
        seen.update(name for name, value in kwargs.items() if value is not None)
        return attend(*args, **kwargs)

    model = tiny_model(family)
    patch_model(model, config_for(model))
    monkeypatch.setitem(
        hf_longctx.model.attention.AttentionInterface._global_mapping, hf_longctx.model.attention.NAME, watched
    )
    model(IDS, num_items_in_batch=torch.tensor(40), output_hidden_states=True)
    assert seen - {"scaling", "dropout"} <= KNOWN
    assert "longctx_forward" in seen


@pytest.mark.parametrize("name", ["softcap", "position_bias", "made_up"])
def test_an_unknown_argument_of_the_call_is_refused_before_anything_is_written(name):
    model = patched_tiny()
    cache = LongCtxCache(model)
    with pytest.raises(UnsupportedModeError, match=f"was given {name}, which neither"):
        model(IDS, **{CACHE: cache, name: 1.0})
    assert not any(layer.seen for layer in cache.layers)
    model(IDS, **{name: None})


MODELS_OWN = {"logits", "labels", "vocab_size", "kwargs"}  # what a model gives its loss itself


@pytest.mark.parametrize("name", sorted(set(inspect.signature(ForCausalLMLoss).parameters) - MODELS_OWN))
def test_the_arguments_of_the_loss_reach_it(name):
    given = {"shift_labels": IDS.roll(-2, 1), "ignore_index": int(IDS[0, 3]), "num_items_in_batch": torch.tensor(7)}
    model, dense = patched_tiny("retrieval"), unpatch_model(patched_tiny("retrieval"))
    dense.load_state_dict(model.state_dict())
    plain, got, want = (
        one(IDS, labels=IDS, **asked).loss
        for one, asked in ((model, {}), (model, {name: given[name]}), (dense, {name: given[name]}))
    )
    torch.testing.assert_close(got, want)
    assert not torch.isclose(got, plain)


@pytest.mark.parametrize("name", sorted(UNUSED - {"is_causal", "output_attentions", "position_ids", "cache_position"}))
def test_arguments_without_a_meaning_for_attention_are_let_through(name):
    model = patched_tiny()
    want = model(IDS).logits
    given = {"num_items_in_batch": torch.tensor(40), "token_type_ids": torch.zeros_like(IDS)}.get(name, True)
    assert torch.equal(model(IDS, **{name: given}).logits, want)


# The cache


def test_a_layer_that_is_run_without_its_cache_says_so():
    model = patched_tiny()
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, CACHE: None}), with_kwargs=True)
    with pytest.raises(UnsupportedModeError, match="layer 1 was run without the LongCtxCache"):
        model(IDS)
    model(IDS, use_cache=False)


def loop(model):
    cache, tokens, out = LongCtxCache(model), IDS, []
    with torch.no_grad():
        for _ in range(4):
            tokens = model(tokens, **{CACHE: cache}).logits[:, -1:].argmax(-1)
            out.append(tokens)
    return torch.cat(out, 1)


PADDED = {"input_ids": IDS.expand(2, -1), "attention_mask": torch.ones(2, 40, dtype=torch.long)}
PADDED["attention_mask"][1, :9] = 0
CHECKPOINTED = {
    "generate": lambda model: model.generate(IDS, max_new_tokens=4)[:, 40:],
    "left-padded": lambda model: model.generate(**PADDED, max_new_tokens=4)[:, 40:],
    "a DynamicCache": lambda model: model.generate(IDS, max_new_tokens=4, cache_implementation="dynamic")[:, 40:],
    "loop": loop,
}


@pytest.mark.parametrize("way", CHECKPOINTED)
def test_gradient_checkpointing_gives_the_right_tokens_or_is_named(way):
    model, run = patched_tiny(), CHECKPOINTED[way]
    want = run(model)
    # Gradient checkpointing is called activation checkpointing in newer versions, where the old name warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model.train()
    if checkpointing_drops_cache(False):
        with pytest.raises(UnsupportedModeError, match="gradient checkpointing in training mode"):
            run(model)
    else:
        assert torch.equal(run(model), want)
    with torch.enable_grad(), pytest.raises(UnsupportedModeError, match="gradient checkpointing in training mode"):
        model(IDS, **{CACHE: LongCtxCache(model)})
    model(IDS, labels=IDS).loss.backward()  # training goes on, without a cache
    assert torch.equal(run(model.eval()), want)


def filled(model):
    cache = LongCtxCache(model)
    with torch.no_grad():
        model(IDS, **{CACHE: cache})
    return cache


LONGER = torch.arange(3, 50)[None]


@pytest.mark.parametrize("make", [filled, LongCtxCache, lambda model: DynamicCache(config=model.config)])
@pytest.mark.parametrize("way", ["argument", "generation_config", "model.generation_config"])
def test_use_cache_false_with_a_cache_is_refused(way, make):
    model = patched_tiny()
    cache = make(model)
    seen = cache.get_seq_length()
    given = {CACHE: cache, "max_new_tokens": 3}
    if way == "argument":
        given["use_cache"] = False
    elif way == "generation_config":
        given["generation_config"] = GenerationConfig(use_cache=False, pad_token_id=0)
    else:
        model.generation_config.use_cache = False
    with pytest.raises(UnsupportedModeError, match="use_cache=False .*with a cache"):
        model.generate(LONGER, **given)
    assert cache.get_seq_length() == seen
    del given[CACHE]
    whole = model.generate(LONGER, **given)
    model.generation_config.use_cache = True
    assert torch.equal(whole, model.generate(LONGER, max_new_tokens=3))


# Continuous batching


BATCHES = {
    "init": lambda model: model.init_continuous_batching(),
    "manager": lambda model: model.continuous_batching_context_manager().__enter__(),
    "generate_batch": lambda model: model.generate_batch([[3, 4, 5]], max_new_tokens=2),
    "paged": lambda model: model.generate(IDS, max_new_tokens=2, cache_implementation="paged"),
}


@pytest.mark.parametrize("way", BATCHES)
def test_continuous_batching_never_takes_another_attention(way, monkeypatch):
    """Transformers' manager would switch the model to one that reads its own pages, and run it dense."""
    model = patched_tiny()
    switched = []
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: switched.append(name))
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        if importlib.util.find_spec(batched.ALLOCATORS) is None:
            with pytest.raises(UnsupportedModeError, match="needs Transformers 5.24"):
                BATCHES[way](one)
            continue
        started = BATCHES[way](one)
        if way == "init":
            assert type(started).__name__ == "HeadBatchingManager"
        elif way == "manager":
            started.stop()
        else:
            assert report(one).steps and report(one).pages
    assert not switched


def test_continuous_batching_of_an_older_transformers_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, batched.ALLOCATORS, None)
    for way in BATCHES.values():
        with pytest.raises(UnsupportedModeError, match="continuous batching .* needs Transformers 5.24"):
            way(patched_tiny())


def test_continuous_batching_of_a_model_that_was_switched_or_unpatched_is_transformers_own():
    model = patched_tiny()
    model.set_attn_implementation("sdpa")
    assert type(model.init_continuous_batching()).__name__ == "ContinuousBatchingManager"
    unpatch_model(model)
    assert "init_continuous_batching" not in vars(model)


def test_a_cache_that_is_none_of_transformers_is_refused():
    class PagedAttentionCache:
        pass

    model = patched_tiny()
    with pytest.raises(UnsupportedModeError, match=f"{CACHE} is a PagedAttentionCache, which a patched model cannot"):
        model(IDS, **{CACHE: PagedAttentionCache()})


# Rotary positions that depend on the length


LIMIT = 64
ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": LIMIT,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "rope_theta": 10000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LIMIT, "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "default": {"rope_type": "default", "rope_theta": 10000.0},
}


def turned(name: str, max_tokens: int = LIMIT):
    torch.manual_seed(0)
    extra = {"rope_parameters": ROPES[name]}
    config = tiny_config("llama", **extra)
    config.max_position_embeddings = 4 * max_tokens if name == "yarn" else max_tokens
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return patch_model(model, config_for(model, "retrieval"))


@pytest.mark.parametrize("name", ROPES)
def test_a_text_in_parts_answers_as_the_whole_or_is_refused(name):
    model = turned(name)
    text = torch.randint(3, 97, (1, 80))
    whole = model.generate(text, max_new_tokens=6)
    for size in (10, 60, 79):
        if name in BY_LENGTH and size != 79:  # the last of 80 tokens alone is decoded, as after a prompt of 79
            with pytest.raises(UnsupportedModeError, match=f"rope_type '{name}': beyond {LIMIT} tokens"):
                model.generate(text, max_new_tokens=6, prefill_chunk_size=size)
        elif name not in BY_LENGTH:
            assert torch.equal(model.generate(text, max_new_tokens=6, prefill_chunk_size=size), whole)
    short = text[:, :50]
    assert torch.equal(
        model.generate(short, max_new_tokens=6, prefill_chunk_size=10), model.generate(short, max_new_tokens=6)
    )


@pytest.mark.parametrize("name", BY_LENGTH)
def test_the_refusal_comes_before_a_write_and_decoding_beyond_the_limit_is_noted(name):
    model = turned(name)
    text, cache = torch.randint(3, 97, (1, 80)), LongCtxCache(model)
    with torch.no_grad():
        model(text[:, :60], **{CACHE: cache})
        with pytest.raises(UnsupportedModeError, match="rope_type"):
            model(text[:, 60:], **{CACHE: cache})
        assert {layer.seen for layer in cache.layers} == {60}
        for at in range(60, 64):
            model(text[:, at : at + 1], **{CACHE: cache})
        assert not any("rope_type" in note for note in report(model).notes)
        model(text[:, 64:65], **{CACHE: cache})
    assert any(f"rope_type {name}" in note for note in report(model).notes)


def test_pads_do_not_count_towards_the_limit():
    model = turned("longrope")
    ids, mask = torch.randint(3, 97, (2, 70)), torch.ones(2, 70, dtype=torch.long)
    mask[:, :20] = 0
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4, prefill_chunk_size=30)
    assert torch.equal(out, model.generate(ids, attention_mask=mask, max_new_tokens=4))
    mask[0, :20] = 1
    with pytest.raises(UnsupportedModeError, match="rope_type"):
        model.generate(ids, attention_mask=mask, max_new_tokens=4, prefill_chunk_size=30)


def test_beyond_the_limit_longrope_goes_on_and_dynamic_does_not():
    text = torch.randint(3, 97, (1, 120))
    model = turned("longrope")
    with torch.no_grad():
        want = model(text).logits[:, -1]
        cache = LongCtxCache(model)
        model(text[:, :90], **{CACHE: cache})
        got = model(text[:, 90:], **{CACHE: cache}).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    model = turned("dynamic")
    cache = LongCtxCache(model)
    with torch.no_grad():
        model(text[:, :90], **{CACHE: cache})
    with pytest.raises(UnsupportedModeError, match="rope_type"):
        model(text[:, 90:], **{CACHE: cache})


@pytest.mark.parametrize(
    ("rope", "found"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "llama3"}, None),
        ({"rope_type": "dynamic"}, ("dynamic", 256)),
        ({"rope_type": "longrope", "original_max_position_embeddings": 99}, ("longrope", 99)),
        ({"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}, ("dynamic", 256)),
        (None, None),
    ],
)
def test_the_limit_of_a_rope(rope, found):
    class Config:
        rope_parameters, max_position_embeddings = rope, 256

    assert length_limit(Config()) == found
