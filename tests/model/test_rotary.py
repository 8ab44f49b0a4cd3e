"""The rotation of each layer of a model: the one by which its own cosines and sines turn keys."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import pytest
import torch
from helpers.tiny import config_for, tiny_config, tiny_model
from transformers import AutoConfig, AutoModel

from hf_longctx import UnsupportedModeError, observe, patch_model, register, unpatch_model
from hf_longctx.cache.plan import RolePlan
from hf_longctx.eviction.expected_attention import ExpectedAttention
from hf_longctx.layout.rotation import Rotation
from hf_longctx.model.family import find_family
from hf_longctx.model.modules import state_of
from hf_longctx.model.plans import asks_rotation, make_rotations
from hf_longctx.model.rotary import rotations
from hf_longctx.model.tiny import tiny_copy
from hf_longctx.stores.full import Full

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 512, "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}
ROPES = {
    "llama": ("llama", None),
    "qwen3": ("qwen3", None),
    "mistral": ("mistral", None),
    "llama3": ("llama", LLAMA3),
    "yarn": ("llama", YARN),
    "linear": ("llama", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
}


def base_of(family: str, dtype=torch.float32, **extra):
    torch.manual_seed(0)
    return AutoModel.from_config(tiny_config(family, **extra), dtype=dtype).eval()


def copy_of(model_type: str):
    """A tiny base model of a type, at the other defaults of its config."""
    torch.manual_seed(0)
    return AutoModel.from_config(tiny_copy(AutoConfig.for_model(model_type)), dtype=torch.float32).eval()


@pytest.mark.quick
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_turns_keys_as_the_model_does(rope, dtype):
    family, parameters = ROPES[rope]
    base = base_of(family, dtype, **({"rope_parameters": parameters} if parameters else {}))
    found = rotations(base, range(3))
    assert set(found) == {0, 1, 2} and len(set(found.values())) == 1
    positions = torch.tensor([[0, 1, 2, 77, 400, 1999]])
    cos, sin = base.rotary_emb(torch.empty(1, dtype=torch.float32), positions)
    x = torch.randn(1, 2, 6, 8)
    turned = x * cos[:, None] + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin[:, None]
    factor = base.rotary_emb.attention_scaling
    assert (factor != 1) == (rope == "yarn")
    torch.testing.assert_close(factor * found[0].turn(x, positions[0]), turned, rtol=0, atol=1e-3)
    torch.testing.assert_close(found[0].turn(turned, -positions[0]), factor * x, rtol=0, atol=1e-3)


@pytest.mark.parametrize("rope", [None, LLAMA3, YARN])
def test_queries_turned_back_are_those_before_the_rotation(rope):
    """Those that attention is handed, and the projection's; with yarn, times its factor."""
    model = tiny_model("llama", **({"rope_parameters": rope} if rope else {}))
    found = rotations(model.model, [0])[0]
    made, seen = [], []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, given, out: made.append(out))
    patch_model(model, config_for(model, "retrieval"))
    with torch.no_grad(), observe(model, lambda layer, q, *rest: seen.append(q)):
        model(torch.randint(3, 97, (1, 300)))
    factor = model.model.rotary_emb.attention_scaling
    want = factor * made[0].view(1, 300, 8, 8).transpose(1, 2)
    torch.testing.assert_close(found.turn(seen[0], -torch.arange(300)), want, rtol=0, atol=1e-4)


def test_scaled_frequencies_are_others():
    turned = {name: rotations(base_of(family, rope_parameters=rope), [0])[0] for name, (family, rope) in ROPES.items()}
    assert turned["llama"] == turned["mistral"]
    assert len({turned[name] for name in ("llama", "llama3", "yarn", "linear")}) == 4


def test_layers_differ():
    """SmolLM3 leaves every fourth layer unturned; Gemma 3 turns its layers with windows by others."""
    base = copy_of("smollm3")
    rotated = base.config.no_rope_layers
    found = rotations(base, range(len(rotated)))
    assert [bool(one.frequencies) for one in found.values()] == [bool(one) for one in rotated] and 0 in rotated
    found = rotations(base := copy_of("gemma3_text"), range(base.config.num_hidden_layers))
    assert len(set(found.values())) == 2 and Rotation(()) not in found.values()


@pytest.mark.parametrize(("model_type", "share"), [("phi", 0.5), ("glm4_moe", 0.5), ("gpt_oss", 1.0)])
def test_some_channels_or_all_turn(model_type, share):
    base = copy_of(model_type)
    found = rotations(base, [0])[0]
    assert 2 * len(found.frequencies) == share * base.layers[0].self_attn.head_dim


@pytest.mark.parametrize("model_type", ["cohere", "glm", "ernie4_5"])
def test_neighbouring_channels_are_refused(model_type):
    with pytest.raises(UnsupportedModeError, match=f"layer 0 of this {model_type} does not turn .*snapkv"):
        rotations(copy_of(model_type), [0])


def test_angles_that_depend_on_the_length_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UnsupportedModeError, match="rope_type 'dynamic' .*Scores that need none: .*snapkv") as got:
        rotations(base_of("llama", rope_parameters=rope), [0])
    assert "expected_attention" not in str(got.value)
    with pytest.raises(UnsupportedModeError, match="positions of this qwen2_vl_text depend on the images"):
        rotations(copy_of("qwen2_vl_text"), [0])


def test_nothing_is_left_behind():
    base = base_of("llama").train()
    base.layers[1].eval()
    before = [module.training for module in base.modules()]
    rotations(base, [0])
    assert [module.training for module in base.modules()] == before and any(before) and not all(before)
    with torch.device("meta"):
        assert rotations(AutoModel.from_config(tiny_config("llama")), [0]) == {}


@dataclasses.dataclass(frozen=True)
class Turning(Full):
    """A store with a score that asks for the rotation."""

    rule: ClassVar = ExpectedAttention()


def turned_by(model) -> list[Rotation | None]:
    return [plan.role("retrieval").rotation for plan in state_of(model).plans]


def test_a_plan_has_the_rotation_where_the_store_asks():
    register("store", "turning", Turning)
    model = tiny_model("llama")
    want = rotations(model.model, [0])[0]
    patch_model(model, config_for(model, "by layer", stores={"retrieval": {"store": "turning"}}))
    assert turned_by(model) == [want, None, want]
    assert all(plan.role("streaming").rotation is None for plan in state_of(model).plans)
    settings = state_of(model).config
    patch_model(model, settings)  # over a patch
    assert turned_by(model) == [want, None, want]
    patch_model(model, config_for(model, "by layer"))
    assert turned_by(model) == [None] * 3
    unpatch_model(model)
    assert state_of(model) is None and RolePlan.rotation is None


def test_only_layers_that_read_the_whole_text_are_asked():
    register("store", "turning", Turning)
    model = tiny_model("qwen3", sliding=9)
    settings = config_for(model, "retrieval", stores={"retrieval": {"store": "turning"}})
    assert asks_rotation(settings) and not asks_rotation(config_for(model, "retrieval"))
    assert set(make_rotations(model.model, settings, find_family("qwen3"))) == {0, 2}
    patch_model(model, settings)
    assert [one is not None for one in turned_by(model)] == [True, False, True]


def test_a_refusal_changes_nothing():
    register("store", "turning", Turning)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny_model("llama", rope_parameters=rope)
    refused = functools.partial(config_for, model, "retrieval", stores={"retrieval": {"store": "turning"}})
    with pytest.raises(UnsupportedModeError, match="rope_type 'dynamic'"):
        patch_model(model, refused())
    assert state_of(model) is None
    patch_model(model, config_for(model, "retrieval"))
    before = state_of(model).config
    with pytest.raises(UnsupportedModeError, match="rope_type 'dynamic'"):
        patch_model(model, refused())
    assert state_of(model).config == before
