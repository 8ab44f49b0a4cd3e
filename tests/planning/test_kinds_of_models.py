"""``plan`` and ``bench memory`` for models that are more than one stack of equal layers with dense MLPs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.every_family import Case, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from hf_longctx import ConfigError, LongCtxConfig, UnsupportedModelError, patch_model
from hf_longctx.bench.memory_check import check
from hf_longctx.model import family as families
from hf_longctx.model.family import Family
from hf_longctx.model.tiny import tiny_copy
from hf_longctx.planning import find as memory_find
from hf_longctx.planning.activations import Subject, activations, masks
from hf_longctx.planning.find import find
from hf_longctx.planning.memory import DENSE, PATCHED, WAYS, MemorySettings
from hf_longctx.planning.plan import plan

SETTINGS = MemorySettings(10**9, "fp32", 2, 100)


def written(config, folder) -> tuple[str, str]:
    """A model's folder with nothing but a config.json, and a YAML for it with half of the heads retrieval."""
    config.save_pretrained(folder / "model")
    facts = LongCtxConfig.describe(config)
    own = facts.get("full_attention_layers") or range(facts["num_hidden_layers"])
    heads = facts["num_key_value_heads"]
    roles = [("RS" * heads)[:heads] if layer in own else "-" * heads for layer in range(facts["num_hidden_layers"])]
    LongCtxConfig.from_dict({"model": facts, "heads": {"roles": roles}}).to_yaml(folder / "ours.yaml")
    return str(folder / "model"), str(folder / "ours.yaml")


# Mixtures of experts.


def moe(**changes):
    return tiny_copy(AutoConfig.for_model("qwen3_moe"), **changes)


def outside(config, tokens=1000) -> int:
    return activations(Subject.of(config, torch.float32, 1)).outside(tokens)


def test_active_experts_are_counted_and_others_are_not():
    """For each expert of a token: the sorted token, gate and up, the activated gate, the product, and a few indices."""
    few, more, wide = moe(num_experts_per_tok=1), moe(num_experts_per_tok=3), moe(moe_intermediate_size=96)
    idle = moe(num_experts=40, num_experts_per_tok=1)
    each = (outside(more) - outside(few)) / (2 * 1000 * 4)
    assert 64 + 4 * 48 < each < 64 + 4 * 48 + 20 and outside(wide) > outside(moe())
    assert outside(idle) - outside(few) < 1000 * 36 * 4 * 4, "the router's numbers alone"


def test_a_dense_layer_among_them_is_followed_as_well():
    dense = outside(moe(mlp_only_layers=[0], intermediate_size=4096))
    assert dense > outside(moe(mlp_only_layers=[0])) and outside(moe(intermediate_size=4096)) == outside(moe())


def test_what_cannot_be_followed_is_refused_in_words(tmp_path, monkeypatch):
    config = tiny_config(Case("mixtral", False))
    config._experts_implementation = "eager"  # its loop asks which experts have tokens
    with pytest.raises(UnsupportedModelError, match="what mixtral holds while a prompt is read cannot be calculated"):
        activations(Subject.of(config, torch.float32, 1))


def test_a_mixture_is_planned(tmp_path):
    path, ours = written(moe(), tmp_path)
    model = AutoModelForCausalLM.from_config(moe())
    found = plan(path, context=1000, memory="1GB", config=ours, dtype="fp32")
    assert found.need.weights == 4 * sum(p.numel() for p in model.parameters())
    assert plan(model, context=1000, memory="1GB", config=ours).need == found.need
    memory_model = find(path, SETTINGS, ours)
    for way in WAYS:
        assert memory_model.kv(way, 1000) == check(memory_model, way, 1000).most


def test_a_config_that_does_not_say_the_experts_is_refused(tmp_path, monkeypatch):
    path, ours = written(moe(), tmp_path)
    with pytest.raises(ConfigError, match="does not say how large and how many the experts of a qwen3_moe are. Name"):
        find(ours, SETTINGS)
    asked = []
    monkeypatch.setattr(memory_find, "find_name", lambda name: "some-config")
    monkeypatch.setattr(memory_find, "load_shipped", lambda name: LongCtxConfig.from_yaml(ours))
    monkeypatch.setattr(
        memory_find, "_read", lambda name, fetch: asked.append(fetch) or AutoConfig.from_pretrained(path)
    )
    assert find("some/id", SETTINGS, ours).kv(DENSE, 10) == find(path, SETTINGS, ours).kv(DENSE, 10)
    assert asked[0] is True, "its config.json is fetched, which says it"


# Eager attention, masks.


def test_an_id_whose_config_json_cannot_be_fetched_is_not_called_unknown(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(AutoConfig, "from_pretrained", no_network)
    for name, said in (
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "an id of the config mixtral-8x7b-instruct-v0.1, .* the experts"),
        ("google/gemma-2-2b", "an id of the config gemma-2-2b, .* what the layers keep"),
        ("you/unknown", "no shipped config and no id of one"),
    ):
        with pytest.raises(ConfigError, match=f"'{name}' is {said}.*cannot be read.*no network"):
            memory_find.find(name, MemorySettings(1))


def test_eager_attention_holds_every_score():
    config = tiny_copy(AutoConfig.for_model("gpt_oss"))
    found = activations(Subject.of(config, torch.float32, 1))
    scores = 4 * 4  # bytes of a score of every query head
    assert found.implementation == "eager" and found.eager.per_pair >= 3 * scores
    assert found.weights.per_pair == scores and found.weights(100, 1000) >= 100 * 1000 * scores
    other = activations(Subject.of(moe(), torch.float32, 1))
    assert other.implementation == "sdpa" and other.eager is other.weights is None


def test_masks_are_those_of_the_type():
    def held(config, chunk, tokens):
        return masks(Subject.of(config, torch.float32, 1), chunk, tokens)[0]

    llama = tiny_copy(AutoConfig.for_model("llama"))
    gemma = tiny_copy(AutoConfig.for_model("gemma3_text"))
    assert held(llama, 1000, 1000) == 0 and held(llama, 100, 1000) == 100 * 1000
    assert held(gemma, 1000, 1000) == 1000 * 1000 and held(gemma, 100, 1000) == 100 * 1000 + 100 * (8 + 100)
    huge = held(llama, 2**32, 2**40)
    assert huge == 2**72


# Multimodal models, and hybrids.


def test_a_multimodal_model_is_counted_whole_and_its_text_is_read(tmp_path):
    config = tiny_copy(AutoConfig.for_model("mistral3"))
    path, ours = written(config, tmp_path)
    model = AutoModelForImageTextToText.from_config(config)
    weights = 4 * sum(p.numel() for p in model.parameters())
    memory_model = find(path, SETTINGS, ours)
    text = config.text_config
    slot = 2 * 2 * text.head_dim * 4 * text.num_key_value_heads * text.num_hidden_layers
    assert memory_model.weights == weights and memory_model.kv(DENSE, 1000) == 1000 * slot
    for way in WAYS:
        assert memory_model.kv(way, 1000) == check(memory_model, way, 1000).most
    before = model.config
    found = plan(model, context=1000, memory="1GB", config=ours)
    assert found.need.weights == weights and model.config is before
    patch_model(model, ours)
    assert plan(model, context=1000, memory="1GB").need == found.need


@pytest.fixture
def hybrid(monkeypatch, tmp_path):
    """A folder and a YAML of three layers of linear attention and one of full attention."""
    known = Family(model_type="qwen3_next", sliding="layer_types")
    monkeypatch.setitem(families.registered["patches"], "qwen3_next", known)
    return written(tiny_copy(AutoConfig.for_model("qwen3_next")), tmp_path)


def test_states_are_counted_and_allocated_dense_and_patched_alike(hybrid):
    memory_model = find(hybrid[0], SETTINGS, hybrid[1])
    text = memory_model.text
    linear = text.layer_types.count("linear_attention")
    keys, values = (
        text.linear_num_key_heads * text.linear_key_head_dim,
        text.linear_num_value_heads * text.linear_value_head_dim,
    )
    conv = (2 * keys + values) * text.linear_conv_kernel_dim * 4
    recurrent = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim * 4
    states = linear * 2 * (conv + recurrent)
    full = 2 * 2 * text.head_dim * 4 * text.num_key_value_heads * (text.num_hidden_layers - linear)
    assert linear > 0 and memory_model.kv(DENSE, 1000) == states + 1000 * full
    for way in WAYS:
        assert memory_model.kv(way, 1000) == check(memory_model, way, 1000).most
    one = replace(memory_model, settings=replace(SETTINGS, batch=1))
    assert memory_model.kv(PATCHED, 1000) == 2 * one.kv(PATCHED, 1000)
