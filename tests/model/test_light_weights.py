"""Weights of 8 and 4 bits by torchao under a patched model: it answers as the same quantised model does unpatched."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers.tiny import DenseMask, config_for, tiny_config
from torchao.prototype.quantization.int4 import Int4OpaqueTensor, PrototypeInt4WeightOnlyConfig
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, TorchAoConfig

import hf_longctx
from hf_longctx import LongCtxCache, patch_model, unpatch_model
from hf_longctx.errors import CacheError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

IDS = torch.arange(3, 103)[None]
STEPS = 8  # tokens to decode
SEEN = 0.5  # a difference of logits that is none of rounding; they go up to 10
QUIET = {"set_inductor_config": False}  # else torchao sets options of torch's compiler for the whole process


@dataclass(frozen=True)
class Kind:
    """How weights are kept.

    Attributes:
        config: torchao's.
        close: largest difference of logits between kernels. None where activations are quantised as well: one that
            falls on the other side of a step moves all after it.
        saved: whether Transformers saves such weights.
    """

    config: Callable[[], object]
    close: float | None = 1e-3
    saved: bool = True


KINDS = {
    "int8": Kind(lambda: Int8WeightOnlyConfig(**QUIET)),
    "int8 activations": Kind(lambda: Int8DynamicActivationInt8WeightConfig(**QUIET), close=None),
    "int4": Kind(lambda: PrototypeInt4WeightOnlyConfig(32, **QUIET), saved=False),
    "4 of 8 bits": Kind(lambda: IntxWeightOnlyConfig(torch.int4, PerGroup(32))),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny model whose sizes fit every kernel: inputs of whole groups of 32, outputs of whole 16."""
    torch.manual_seed(0)
    config = tiny_config("llama", group=4, head_dim=16)
    config.vocab_size, config.intermediate_size = 128, 64
    made = tmp_path_factory.mktemp("light")
    AutoModelForCausalLM.from_config(config).save_pretrained(made)
    return str(made)


@pytest.fixture
def plain(folder, kind):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def light(plain, kind):
    model = copy.deepcopy(plain)
    quantize_(model, kind.config())
    return model


@torch.no_grad()
def logits(model, ids=IDS) -> torch.Tensor:
    return model(ids).logits


@torch.no_grad()
def tokens(model) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=STEPS, do_sample=False)


def apart(a, b) -> float:
    return (logits(a) - (b if isinstance(b, torch.Tensor) else logits(b))).abs().max().item()


@every_kind
def test_all_retrieval_answers_as_the_model_itself(kind, plain, light):
    want, said = logits(light), tokens(light)
    assert apart(plain, want) > SEEN, "a control: the weights are quantised"
    patch_model(light, config_for(light, "retrieval", kernel="stock"))
    assert torch.equal(logits(light), want) and torch.equal(tokens(light), said)
    patch_model(light, config_for(light, "retrieval"))
    assert kind.close is None or apart(light, want) <= kind.close and torch.equal(tokens(light), said)
    unpatch_model(light)
    assert torch.equal(logits(light), want)


@every_kind
def test_streaming_heads_equal_the_dense_mask(kind, light, shadow):
    config = config_for(light)
    with DenseMask(light, config):
        want = logits(light)
    patch_model(light, config_for(light, kernel="reference"))
    assert torch.equal(logits(light), want)
    patch_model(light, config)
    assert kind.close is None or apart(light, want) <= kind.close
    watch = shadow(config)
    tokens(light)
    assert watch.calls == 3 * STEPS
    assert watch.error <= 1e-5
    patch_model(light, config_for(light, recent=15))
    assert apart(light, want) > SEEN, "a control: a window that is one token shorter"


@every_kind
def test_weights_may_be_quantised_before_or_after_patching(kind, plain, light):
    after = patch_model(copy.deepcopy(plain), config_for(plain))
    before = tokens(after)
    quantize_(after, kind.config())
    patch_model(light, config_for(light))
    assert torch.equal(logits(after), logits(light)) and torch.equal(tokens(after), tokens(light))
    assert not torch.equal(logits(after), logits(patch_model(plain, config_for(plain)))), "a control"
    assert torch.equal(tokens(plain), before)


@every_kind
def test_copies_and_saved_caches(kind, plain, light, tmp_path):
    patch_model(light, config_for(light))
    again = copy.deepcopy(light)
    assert torch.equal(logits(again), logits(light))
    cache = LongCtxCache(light)
    with torch.no_grad():
        light(IDS, past_key_values=cache)
    cache.save(tmp_path / "cache")
    more = torch.cat([IDS, torch.tensor([[5]])], 1)
    given = {"max_new_tokens": STEPS, "do_sample": False}
    loaded = LongCtxCache.load(tmp_path / "cache", again)
    got = again.generate(more, past_key_values=loaded, **given)
    assert torch.equal(got, light.generate(more, past_key_values=cache, **given))
    with pytest.raises(CacheError, match="was made with another model"):
        LongCtxCache.load(tmp_path / "cache", patch_model(plain, config_for(plain)))


@every_kind
def test_a_folder_that_is_quantised_as_it_is_loaded(kind, plain, folder, tmp_path):
    load = {"quantization_config": TorchAoConfig(kind.config())}
    config = config_for(plain)
    model = hf_longctx.AutoModelForCausalLM.from_pretrained(folder, longctx=config.to_dict(), **load).eval()
    quantize_(plain, kind.config(), filter_fn=lambda module, name: is_linear(module) and name != "lm_head")
    assert torch.equal(logits(model), logits(patch_model(plain, config))), "lm_head stays as it is"
    if not kind.saved:
        with pytest.raises(ValueError, match=f"Unsupported tensor type: .*{Int4OpaqueTensor.__name__}"):
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    again = hf_longctx.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(dense), logits(unpatch_model(model)))
    assert not torch.equal(logits(dense), logits(again)), "a control"


@every_kind
def test_weights_quantised_in_memory_are_not_saved(kind, light, tmp_path):
    for model in (light, patch_model(copy.deepcopy(light), config_for(light))):
        with pytest.raises(RuntimeError, match="invalid python storage"):
            model.save_pretrained(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".safetensors")]


@pytest.mark.parametrize("kind", [KINDS["int8"]], ids=["int8"])
def test_compiled_linears_under_a_patched_model(kind, light):
    patch_model(light, config_for(light))
    want, said = logits(light), tokens(light)
    ran = []

    def counting(graph, inputs):
        ran.append(graph)
        return graph.forward

    for module in light.modules():
        if is_linear(module):
            module.compile(backend=counting)
    torch.testing.assert_close(logits(light), want, atol=kind.close, rtol=0)
    assert torch.equal(tokens(light), said) and ran


def is_linear(module) -> bool:
    return isinstance(module, torch.nn.Linear)
