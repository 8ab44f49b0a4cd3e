"""A model's fingerprint changes with whatever changes its keys, and with nothing else."""

from __future__ import annotations

import hashlib

import pytest
import torch
from helpers.memory import Allocations
from helpers.tiny import FAMILIES, config_for, tiny_model
from peft import LoraConfig, get_peft_model
from torch.utils._pytree import tree_map_only

from hf_longctx import CacheError, LongCtxCache, UnsupportedModeError, patch_model
from hf_longctx.cache.fingerprint import NUMBERS, fingerprint, weights_digest
from hf_longctx.tasks.answer import input_device


def of(model) -> dict:
    return fingerprint(model.base_model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_counts_and_the_output_head_does_not(family):
    model = tiny_model(family, torch.bfloat16)
    before, counted = of(model), 0
    for name, weight in model.base_model.named_parameters():
        flat = weight.data.view(-1)
        for place in {0, len(flat) - 1}:
            kept = flat[place].clone()
            flat[place] = 3.5
            now = of(model)
            assert {key for key in before if now[key] != before[key]} == {"weights"}, name
            flat[place] = kept
            counted += 1
    assert counted > 50 and of(model) == before
    model.lm_head.weight.data.zero_()
    model.eval().requires_grad_(False)
    assert of(model) == before
    patch_model(model, config_for(model))
    assert of(model) == before
    with torch.no_grad():
        model(torch.arange(3, 60)[None])
    assert of(model) == before


def slow_digest(module: torch.nn.Module) -> str:
    """The rule that the files of version 2 hold: names, dtypes, shapes, then 256 values of each weight, by name."""
    named = sorted(module.state_dict().items())
    digest = hashlib.sha256()
    for name, weight in named:
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
    for _, weight in named:
        flat = weight.flatten()
        count = min(256, len(flat))
        for i in range(count):
            place = i * (len(flat) - 1) // max(count - 1, 1)
            digest.update(flat[place : place + 1].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_digest_is_the_one_that_files_hold(family):
    model = tiny_model(family)
    assert weights_digest(model.base_model) == slow_digest(model.base_model) == of(model)["weights"]
    assert weights_digest(model) == slow_digest(model) == weights_digest(model, complete=False)


def test_weights_that_are_elsewhere_count_by_name_and_shape_where_that_is_enough():
    model = tiny_model("llama", layers=2)
    whole = weights_digest(model)
    values = model.model.layers[1].mlp.up_proj.weight
    digests = []
    for shape in (values.shape, (4, 3)):
        model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.empty(shape, device="meta"))
        with pytest.raises(UnsupportedModeError, match="layers.1.mlp.up_proj.weight is on the meta device"):
            weights_digest(model)
        digests.append(weights_digest(model, complete=False))
    assert len({whole, *digests}) == 3
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    assert weights_digest(model, complete=False) not in digests, "the others count by value"
    assert weights_digest(model.to("meta"), complete=False)


@pytest.mark.parametrize(
    ("change", "differ"),
    [
        ({"dtype": torch.float64}, {"dtype", "weights"}),
        ({"layers": 4}, {"num_hidden_layers", "weights"}),
        ({"head_dim": 16}, {"head_dim", "weights"}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}, {"rope_theta", "rope"}),
    ],
)
def test_what_differs_is_named(change, differ):
    def made(**kwargs) -> dict:
        torch.manual_seed(4)
        return of(tiny_model("llama", **kwargs))

    before, after = made(), made(**change)
    assert {key for key in before if before[key] != after[key]} == differ
    assert made() == before


def test_saved_buffers_count_and_passing_ones_do_not():
    model = tiny_model()
    layer = model.base_model.layers[0]
    before = of(model)
    layer.register_buffer("passing", torch.ones(3), persistent=False)
    assert of(model) == before
    layer.register_buffer("packed", torch.ones(3, dtype=torch.uint8))
    packed = of(model)
    layer.packed[1] = 2
    assert len({one["weights"] for one in (before, packed, of(model))}) == 3


def test_weights_are_not_read_as_a_whole():
    model = tiny_model("llama", layers=2)
    model.base_model.embed_tokens = torch.nn.Embedding(100_000, 32)
    with Allocations() as made:
        of(model)
    weights = len(list(model.base_model.parameters()))
    assert made.peak < weights * NUMBERS * (4 + 2 * 8) + 100_000 < model.base_model.embed_tokens.weight.nbytes / 10


@pytest.fixture
def adapted():
    model = tiny_model("llama", torch.float64)
    plain = of(model)
    settings = {"target_modules": ["q_proj", "k_proj"], "init_lora_weights": False, "lora_alpha": 8}
    peft = get_peft_model(model, LoraConfig(r=2, **settings), adapter_name="one")
    peft.add_adapter("two", LoraConfig(r=2, **settings))
    return peft, plain


def test_active_adapters_count_and_others_do_not(adapted):
    peft, plain = adapted
    base = peft.get_base_model()
    one = of(base)
    assert one["adapters"] == ["one (scaling 4.0)"] and one["weights"] != plain["weights"]
    named = dict(base.named_parameters())
    other = next(weight for name, weight in named.items() if "lora_B.two" in name)
    other.data.add_(1)
    assert of(base) == one, "a change of an adapter that is not active"
    own = next(weight for name, weight in named.items() if "lora_B.one" in name)
    own.data.add_(1)
    assert of(base)["weights"] != one["weights"]
    own.data.sub_(1)
    peft.set_adapter("two")
    two = of(base)
    assert two["adapters"] == ["two (scaling 4.0)"] and two["weights"] != one["weights"]
    with peft.disable_adapter():
        assert of(base) == plain, "as if there were none"
    base.base_model.layers[0].self_attn.k_proj.scaling["two"] = 9.0
    assert of(base)["adapters"] == ["two (scaling 4.0)", "two (scaling 9.0)"]


def test_a_cache_goes_with_the_adapter_that_filled_it(adapted, tmp_path):
    peft, _ = adapted
    patch_model(peft, config_for(peft.get_base_model()))
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        cache = peft(ids).past_key_values
    cache.save(tmp_path / "cache")
    loaded = LongCtxCache.load(tmp_path / "cache", peft)
    with torch.no_grad():
        want = peft(ids[:, :1], past_key_values=cache).logits
        assert torch.equal(peft(ids[:, :1], past_key_values=loaded).logits, want)
    peft.set_adapter("two")
    with pytest.raises(CacheError, match=r'adapters: \["one \(scaling 4.0\)"\] there, \["two \(scaling 4.0\)"\] here'):
        LongCtxCache.load(tmp_path / "cache", peft)
    peft.set_adapter("one")
    assert LongCtxCache.load(tmp_path / "cache", peft).seen == 57


def test_weights_elsewhere_are_refused(tmp_path):
    model = tiny_model()
    patch_model(model, config_for(model))
    with torch.no_grad():
        cache = model(torch.arange(3, 60)[None]).past_key_values
    cache.save(tmp_path / "cache")
    layer = model.base_model.layers[1]
    kept, layer.mlp = layer.mlp, torch.nn.Linear(3, 3, device="meta")
    for step in (lambda: cache.save(tmp_path / "other"), lambda: LongCtxCache.load(tmp_path / "cache", model)):
        with pytest.raises(UnsupportedModeError, match=r"layers.1.mlp.weight is on the meta device \(offloaded"):
            step()
    layer.mlp = kept
    layer.self_attn.k_proj._hf_device_mesh = object()
    with pytest.raises(UnsupportedModeError, match="layers.1.self_attn.k_proj is spread over processes"):
        cache.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


# Weights that are no plain tensors.


class Hidden(torch.Tensor):
    """A weight kept in 8 bits that can be multiplied, moved and detached, and nothing else, as torchao's."""

    @staticmethod
    def __new__(cls, codes, step):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=step.dtype, device=codes.device)

    def __init__(self, codes, step):
        self.codes, self.step = codes, step

    @classmethod
    def of(cls, whole):
        step = whole.abs().amax() / 127
        return cls((whole / step).round().to(torch.int8), step)

    def whole(self):
        return self.codes * self.step

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::detach", "aten::alias"):
            return cls(args[0].codes, args[0].step)
        if func._schema.name in ("aten::t", "aten::mm", "aten::addmm", "aten::linear"):
            return func(*tree_map_only(cls, cls.whole, args), **(kwargs or {}))
        raise NotImplementedError(f"{func} is not for {cls}")


class Quantised(Hidden):
    """One that shows what it packs, as torchao's do."""

    def __tensor_flatten__(self):
        return ["codes", "step"], {}


def packed(kind) -> torch.nn.Module:
    torch.manual_seed(0)
    model = tiny_model("llama").requires_grad_(False)
    if kind == "dynamic":
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    else:
        for module in model.base_model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(kind.of(module.weight.data), requires_grad=False)
    return patch_model(model, config_for(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", [Quantised, "dynamic"])
def test_packed_weights_count_and_their_caches_are_saved(kind, tmp_path):
    model, ids = packed(kind), torch.arange(3, 60)[None]
    cache = LongCtxCache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "cache")
        loaded = LongCtxCache.load(tmp_path / "cache", model)
        want = model(ids[:, :1], past_key_values=cache).logits
        assert torch.equal(model(ids[:, :1], past_key_values=loaded).logits, want)
    assert input_device(model) == torch.device("cpu")
    before, hashed = of(model), weights_digest(model, complete=False)
    assert of(packed(kind)) == before and weights_digest(packed(kind), complete=False) == hashed
    linear = model.base_model.layers[1].mlp.up_proj
    if kind == "dynamic":
        weight, bias = linear._packed_params._weight_bias()
        codes = weight.int_repr()
        codes[0, 0] += 1
        other = torch._make_per_tensor_quantized_tensor(codes, weight.q_scale(), weight.q_zero_point())
        linear.set_weight_bias(other, bias)
    else:
        linear.weight.codes[0, 0] += 1
        assert weights_digest(model, complete=False) != hashed
    assert {key for key in before if of(model)[key] != before[key]} == {"weights"}
    with pytest.raises(CacheError, match="was made with another model"):
        LongCtxCache.load(tmp_path / "cache", model)


def test_a_weight_that_hides_its_numbers_is_named(tmp_path):
    model = packed(Hidden)
    with torch.no_grad():
        cache = model(torch.arange(3, 60)[None]).past_key_values
    with pytest.raises(
        UnsupportedModeError,
        match="layers.0.self_attn.q_proj.weight is of class Hidden, which does not show .*__tensor_flatten__",
    ):
        cache.save(tmp_path / "cache")
    assert weights_digest(model, complete=False)
