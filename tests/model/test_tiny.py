"""A tiny copy has the class and the structure of its config, and a model of it runs."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_longctx.model.tiny import HEADS, KV_HEADS, VOCAB, WINDOW, tiny_copy

IDS = torch.tensor([[5, 6, 7]])
TEXT = ["llama", "mistral", "ministral3", "qwen2_moe", "qwen3_next", "llama4_text", "gemma2", "gemma4_text", "gpt_oss"]
TEXT += ["phi3", "smollm3", "deepseek_v3", "ernie4_5_moe", "jamba"]
WRAPPERS = ["qwen2_5_vl", "qwen3_vl_moe", "gemma3", "mistral3"]
# Their default configs cannot be built or run, or they are built around something else than decoder layers.
NOT_BUILT = 30


def default(model_type: str):
    return CONFIG_MAPPING[model_type]()


def runs(small, auto=AutoModelForCausalLM) -> bool:
    with torch.no_grad():
        logits = auto.from_config(small, attn_implementation="eager").eval()(input_ids=IDS).logits
    return logits.shape == (1, 3, VOCAB)


@pytest.mark.parametrize("model_type", TEXT)
def test_a_copy_has_few_small_layers_and_runs(model_type):
    config = default(model_type)
    before = config.to_dict()
    small = tiny_copy(config)
    assert config.to_dict() == before
    assert type(small) is type(config)
    assert small.num_attention_heads == HEADS
    assert small.num_key_value_heads == (HEADS if getattr(config, "kv_lora_rank", None) else KV_HEADS)
    assert 2 <= small.num_hidden_layers <= 4
    assert set(getattr(small, "layer_types", None) or ()) == set(getattr(config, "layer_types", None) or ())
    windows = {getattr(one, "sliding_window", None) is None for one in (small, config)}
    assert len(windows) == 1
    assert runs(small)
    assert type(config).from_dict(small.to_dict()).to_dict() == small.to_dict(), "it is saved and read as any config"


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_the_configs_inside_of_a_multimodal_one_are_tiny_as_well(model_type):
    small = tiny_copy(default(model_type))
    assert small.get_text_config().num_key_value_heads == KV_HEADS
    assert small.vision_config.hidden_size == small.get_text_config().hidden_size
    assert runs(small, AutoModelForImageTextToText)


def test_one_layer_of_each_kind_is_kept_in_order():
    llama4 = tiny_copy(default("llama4_text"))
    assert llama4.layer_types == ["chunked_attention", "full_attention"]
    assert llama4.no_rope_layers == [1, 0]
    assert llama4.moe_layers == [0, 1]
    moe = default("qwen3_moe")
    moe.mlp_only_layers = [0, 5]
    assert tiny_copy(moe).mlp_only_layers == [0]
    dense_first = default("glm4_moe")
    dense_first.n_routed_experts = 8
    assert tiny_copy(dense_first).first_k_dense_replace == 1
    shared = tiny_copy(default("gemma3n_text"))
    assert 0 < shared.num_kv_shared_layers < shared.num_hidden_layers
    own = shared.layer_types[: -shared.num_kv_shared_layers]
    assert set(shared.layer_types[-shared.num_kv_shared_layers :]) <= set(own), (
        "a layer that shares has one to share with"
    )


def test_layers_with_a_head_dim_of_their_own_keep_it_apart():
    small = tiny_copy(default("gemma4_text"))
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert [layer.head_dim for layer in small.per_layer_config] == [16, 32]


@pytest.mark.parametrize("sections", [[16, 24, 24], None])
def test_sections_of_the_positions_cover_the_rotated_dims(sections):
    config = default("qwen2_5_vl").text_config
    if sections:
        config.rope_parameters["mrope_section"] = sections
    assert sum(tiny_copy(config).rope_parameters["mrope_section"]) == 8


def test_lists_of_rope_factors_are_cut_to_the_rotated_dims():
    config = default("phi3")
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    config.rope_parameters |= {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config.original_max_position_embeddings = 4096
    small = tiny_copy(config)
    assert len(small.rope_parameters["short_factor"]) == 6
    assert len(config.rope_parameters["short_factor"]) == 48
    assert runs(small)


def test_token_ids_are_inside_of_the_vocabulary_and_not_equal():
    small = tiny_copy(default("qwen3_vl"))
    names = [name for name, value in vars(small).items() if name.endswith("token_id") and value is not None]
    ids = [getattr(small, name) for name in names]
    assert "image_token_id" in names
    assert len(set(ids)) == len(ids)
    assert all(99 < one < VOCAB for name, one in zip(names, ids, strict=True) if "eos" not in name)
    assert tiny_copy(default("glm4")).eos_token_id == [2]


def test_windows_and_changes_of_the_text_config():
    assert tiny_copy(default("mistral")).sliding_window == WINDOW
    small = tiny_copy(default("gemma3"), initializer_range=0.3, sliding_window=5)
    assert (small.text_config.initializer_range, small.text_config.sliding_window) == (0.3, 5)


@pytest.mark.slow
def test_nearly_every_type_is_built_and_run():
    failed = {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            assert runs(tiny_copy(default(model_type)))
        except Exception as error:  # noqa: BLE001 - reported
            failed[model_type] = f"{type(error).__name__}: {error}"[:200]
    assert len(failed) <= NOT_BUILT, failed
