"""Contract tests: the facts about Transformers that hf_longctx relies on, one small test each, for every family.

They need transformers, torch and pytest, nothing of hf_longctx. A failure after an upgrade of Transformers names the
assumption that broke. Where versions differ in a way that duck typing handles, a test accepts both: the suite was run
on Transformers 5.0.0, 5.23.0 and 5.24.0 and must stay free of version numbers.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast

NAME = "contract_probe"  # a registered name: free of "flash", "sdpa", "flex_attention", "/", "paged|"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # tests/model/test_families.py asks what differs of every type
SLIDING = tuple(one for one in FAMILIES if hasattr(AutoConfig.for_model(one), "sliding_window"))
LAYERS, VOCAB, EOS = 2, 61, 60
RELIES = "hf_longctx relies on: "
FIELDS = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
CACHE = "cache" if "cache" in FIELDS else "past_key_values"  # one name or the other, everywhere
BASE_INPUTS = {"input_ids", "attention_mask", "position_ids", "use_cache", CACHE}
MASK_ARGS = {
    "batch_size",
    "kv_length",
    "kv_offset",
    "mask_function",
    "attention_mask",
    "allow_is_causal_skip",
    "config",
}


# ------------------------------------------------------------------------------------ the probe, in our library's place


class Handle:
    """What our cache layer returns as both key and value: an opaque Python object."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = k, v


class ProbeLayer(CacheLayerMixin):
    """A layer with every method name that any 5.x calls, and no version branch."""

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, log: list[tuple[str, Any]], layer_idx: int) -> None:
        super().__init__()
        self.log, self.layer_idx = log, layer_idx
        self.handle: Handle | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        old = self.handle
        k = key_states if old is None else torch.cat([old.k, key_states], dim=2)
        v = value_states if old is None else torch.cat([old.v, value_states], dim=2)
        self.handle, self.is_initialized = Handle(k, v), True
        self.log.append(("update", (self.layer_idx, args, kwargs)))
        return self.handle, self.handle

    def get_seq_length(self) -> int:
        return 0 if self.handle is None else self.handle.k.shape[2]

    def get_mask_sizes(self, query: int | torch.Tensor) -> tuple[int, int]:
        new = query if isinstance(query, int) else query.shape[0]
        return self.get_seq_length() + new, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        self.log.append(("record", self.layer_idx))

    def crop(self, tokens: int | torch.Tensor) -> None:
        tokens = int(tokens)  # 5.17 passes a tensor
        self.log.append(("crop", (tokens, self.get_seq_length())))
        keep = self.get_seq_length() + tokens if tokens <= 0 else min(tokens, self.get_seq_length())
        self.handle = Handle(self.handle.k[:, :, :keep], self.handle.v[:, :, :keep])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.log.append(("reorder", beam_idx))
        self.handle = Handle(self.handle.k[beam_idx], self.handle.v[beam_idx])


class ProbeCache(Cache):
    def __init__(self, log: list[tuple[str, Any]]) -> None:
        super().__init__(layers=[ProbeLayer(log, i) for i in range(LAYERS)])


class Probe:
    """Our attention and mask functions, recording what they get."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []
        self.calls: list[dict[str, Any]] = []
        self.masks: list[dict[str, Any]] = []
        self.mask_result: Callable[[dict[str, Any]], Any] = lambda kwargs: kwargs["attention_mask"]

    def attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: Any,
        value: Any,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        self.log.append(("attention", module.layer_idx))
        call = {"module": module, "query": query, "key": key, "value": value, "mask": attention_mask}
        self.calls.append(call | {"scaling": scaling, "dropout": dropout, "kwargs": kwargs})
        k, v = (key.k, value.v) if isinstance(key, Handle) else (key, value)
        out = dense(query, k, v, attention_mask, scaling, kwargs.get("sliding_window"))
        return out.transpose(1, 2).contiguous(), None

    def mask(self, *args: Any, **kwargs: Any) -> Any:
        assert not args, RELIES + "mask functions are called with keywords only"
        self.masks.append(kwargs)
        return self.mask_result(kwargs)


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float | None, window: int | None
) -> torch.Tensor:
    """Causal attention with an optional 2D padding mask and window; a fully masked query reads everything evenly."""
    length, total = q.shape[2], k.shape[2]
    i, j = torch.arange(total - length, total)[:, None], torch.arange(total)[None]
    visible = (j <= i) & (i - j < (window or total))
    visible = visible[None, None].expand(q.shape[0], 1, -1, -1)
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        visible = visible & mask[:, None, None, :total].bool()
    bias = torch.where(visible, 0.0, -1e9)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling, enable_gqa=True)


class CacheMaker:
    """Stands in for our override of `_prepare_cache_for_generation`: a callable object, not a bound method."""

    def __init__(self) -> None:
        self.args, self.kwargs, self.log = (), {}, []

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = (generation_config, model_kwargs, *args), kwargs
        model_kwargs[CACHE] = ProbeCache(self.log)


class BaseHook:
    """Stands in for our forward pre-hook on the base model."""

    def __init__(self, **inject: Any) -> None:
        self.inject, self.seen, self.past = inject, [], []

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self.seen.append((args, dict(kwargs)))
        past = kwargs.get(CACHE)
        self.past.append(0 if past is None else past.get_seq_length())
        return args, {**kwargs, **self.inject}

    def inputs(self, step: int = 0) -> dict[str, Any]:
        return self.seen[step][1]


# ---------------------------------------------------------------------------------------------------- fixtures, helpers


@pytest.fixture
def probe() -> Iterator[Probe]:
    p = Probe()
    AttentionInterface.register(NAME, p.attention)
    AttentionMaskInterface.register(NAME, p.mask)
    yield p
    AttentionInterface._global_mapping.pop(NAME, None)
    AttentionMaskInterface._global_mapping.pop(NAME, None)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def make_config(family: str, **changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    fields = {"vocab_size": VOCAB, "num_hidden_layers": LAYERS, "head_dim": 8, "max_position_embeddings": 256, **sizes}
    fields["initializer_range"] = 0.2  # large enough for the tokens to depend on positions and masks
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS}  # prompt lookup of 5.0 needs an eos
    extra = {"sliding_window": None} if family == "mistral" else {}
    return transformers.AutoConfig.for_model(family, **{**fields, **tokens, **extra, **changes})


def make_model(family: str, implementation: str = NAME, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(family, **changes), attn_implementation=implementation)
    return model.float().eval()


@pytest.fixture
def model(probe: Probe, family: str) -> Any:
    return make_model(family)


def make_ids(batch: int = 1, length: int = 9) -> torch.Tensor:
    return torch.randint(2, EOS, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))


def hook_base(model: Any, **inject: Any) -> BaseHook:
    hook = BaseHook(**inject)
    model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    return hook


def give_cache(model: Any) -> CacheMaker:
    maker = CacheMaker()
    model._prepare_cache_for_generation = maker
    return maker


def generate(model: Any, ids: torch.Tensor, new: int = 4, **kwargs: Any) -> Any:
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=new, suppress_tokens=[EOS], do_sample=False, **kwargs)


def checkpointing(model: Any, **kwargs: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs or None)
    model.enable_input_require_grads()
    model.train()


def attentions(model: Any) -> list[nn.Module]:
    return [layer.self_attn for layer in model.get_decoder().layers]


def logged(log: list[tuple[str, Any]], word: str) -> list[Any]:
    return [value for name, value in log if name == word]


# -------------------------------------------------------------------------------------------- 1. the attention function


def test_attention_gets_what_update_returned(model: Any, probe: Probe) -> None:
    cache = ProbeCache(probe.log)
    model(make_ids(), **{CACHE: cache})
    order = [(name, value[0] if name == "update" else value) for name, value in probe.log]
    expected = [(name, layer) for layer in range(LAYERS) for name in ("update", "attention")]
    assert order == expected, RELIES + f"in each layer: cache update, at once the attention function; saw {order}"
    same = all(c["key"] is c["value"] is cache.layers[i].handle for i, c in enumerate(probe.calls))
    assert same, RELIES + "the object returned by a cache layer's update arrives untouched as key and value"


def test_update_may_get_extra_arguments(model: Any, probe: Probe) -> None:
    model(make_ids(), **{CACHE: ProbeCache(probe.log)})
    extra = [(args, kwargs) for _, args, kwargs in logged(probe.log, "update")]
    ok = all(set(kwargs) <= {"kwargs"} and (not args or isinstance(args[0], dict | None)) for args, kwargs in extra)
    assert ok, (
        RELIES
        + f"layer.update(k, v) with at most a positional cache_kwargs dict (5.0, 5.2) or kwargs= (5.24); saw {extra}"
    )


def test_attention_arguments_and_result_layout(model: Any, probe: Probe, family: str) -> None:
    ids = make_ids(batch=2)
    out = model(ids, use_cache=False)
    call = probe.calls[0]
    shapes = tuple(call["query"].shape), tuple(call["key"].shape), tuple(call["value"].shape)
    assert shapes == ((2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8)), (
        RELIES + f"q [B,H,T,D], k and v [B,H_kv,T,D]; saw {shapes}"
    )
    assert call["scaling"] == call["module"].scaling == 8**-0.5, RELIES + "scaling is passed as a keyword"
    assert call["dropout"] == 0.0, RELIES + "dropout is 0.0 in eval mode"
    assert isinstance(call["module"].layer_idx, int), (
        RELIES + "the module is the first argument and knows its layer_idx"
    )
    expected = make_model(family, "sdpa")(ids, use_cache=False)
    assert torch.allclose(out.logits, expected.logits, atol=1e-5), RELIES + "the function's result has layout [B,T,H,D]"


def test_dropout_is_passed_in_training(probe: Probe, family: str) -> None:
    make_model(family, attention_dropout=0.25).train()(make_ids(), use_cache=False)
    assert probe.calls[0]["dropout"] == 0.25, RELIES + "dropout equals config.attention_dropout in training mode"


def test_attention_weights_may_be_none(model: Any, probe: Probe) -> None:
    out = model(make_ids(), use_cache=False)
    assert out.attentions is None, RELIES + "an attention function may return None as weights"


def test_implementation_is_read_at_call_time(model: Any, probe: Probe) -> None:
    for module in attentions(model):
        module.config._attn_implementation = "sdpa"
    model(make_ids(), use_cache=False)
    assert not probe.calls, RELIES + "attention reads self.config._attn_implementation at every call"
    attentions(model)[0].config._attn_implementation = NAME
    model(make_ids(), use_cache=False)
    assert probe.calls, RELIES + "writing config._attn_implementation switches the attention function"


def test_opaque_value_fails_loudly_in_sdpa(probe: Probe, family: str) -> None:
    with pytest.raises((TypeError, AttributeError)):
        make_model(family, "sdpa")(make_ids(), **{CACHE: ProbeCache(probe.log)})


# --------------------------------------------------------------------------------------------------- 2. custom keywords


def rows_seen(probe: Probe, rows: object) -> bool:
    return {c["module"].layer_idx for c in probe.calls if c["kwargs"].get("longctx_forward") is rows} == set(
        range(LAYERS)
    )


def test_extra_keyword_reaches_every_layer(model: Any, probe: Probe) -> None:
    rows = object()
    hook_base(model, longctx_forward=rows)
    model(make_ids())
    assert rows_seen(probe, rows), (
        RELIES + "a keyword added by the base pre-hook reaches the attention function untouched"
    )


def test_extra_keyword_in_every_step_of_generate(model: Any, probe: Probe) -> None:
    rows = object()
    hook_base(model, longctx_forward=rows)
    generate(model, make_ids(), new=3)
    same = [c["kwargs"].get("longctx_forward") is rows for c in probe.calls]
    assert len(same) == 3 * LAYERS and all(same), (
        RELIES + "the added keyword reaches all layers in every step of generate"
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_extra_keyword_under_gradient_checkpointing(model: Any, probe: Probe, reentrant: bool) -> None:
    rows = object()
    hook_base(model, longctx_forward=rows)
    checkpointing(model, use_reentrant=reentrant)
    model(make_ids()).logits.sum().backward()
    assert len(probe.calls) == 2 * LAYERS, (
        RELIES + "gradient checkpointing runs the attention function again in backward"
    )
    assert all(c["kwargs"].get("longctx_forward") is rows for c in probe.calls), (
        RELIES + "the keyword survives checkpointing"
    )


def test_gradient_checkpointing_drops_the_cache(model: Any, probe: Probe) -> None:
    checkpointing(model)
    model(make_ids(), **{CACHE: ProbeCache(probe.log)}, use_cache=True).logits.sum().backward()
    plain = all(isinstance(c["key"], torch.Tensor) for c in probe.calls)
    assert plain and not logged(probe.log, "update"), RELIES + "checkpointed layers get no cache: plain tensors arrive"


def test_checkpointing_without_gradients_drops_the_cache_or_keeps_it_whole(model: Any, probe: Probe) -> None:
    checkpointing(model)
    cache = ProbeCache(probe.log)
    with torch.no_grad():
        model(make_ids(), **{CACHE: cache}, use_cache=True)
    lengths = {layer.get_seq_length() for layer in cache.layers}
    assert lengths in ({0}, {9}), RELIES + f"without gradients too it is all layers or none; saw {lengths}"
    kept = [isinstance(c["key"], Handle) for c in probe.calls]
    assert kept == [lengths == {9}] * LAYERS, RELIES + "a layer that keeps its cache hands on what update returned"


def test_modules_pass_known_keywords_only(model: Any, probe: Probe) -> None:
    model(make_ids(), num_items_in_batch=torch.tensor(9), output_hidden_states=True)
    model(make_ids(), use_cache=False, output_attentions=True)
    generate(model, make_ids(), new=2)
    known = {"position_ids", "use_cache", "sliding_window", "num_items_in_batch", "cache_position"}
    known |= {"output_hidden_states", "output_attentions"}
    seen = {name for c in probe.calls for name, value in c["kwargs"].items() if value is not None}
    assert seen <= known, RELIES + f"attention modules pass {sorted(known)} beside scaling and dropout; saw {seen}"


# ------------------------------------------------------------------------------------------------------------- 3. masks


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = make_ids(batch=2), torch.ones(2, 9, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 0, 0
    return ids, mask


def test_unregistered_mask_name_drops_the_padding_mask(model: Any, probe: Probe) -> None:
    AttentionMaskInterface._global_mapping.pop(NAME)
    ids, mask = padded()
    model(ids, attention_mask=mask)
    assert all(c["mask"] is None for c in probe.calls), (
        RELIES + "without a mask function the mask is dropped (so we register one)"
    )


def test_mask_function_gets_the_2d_bool_mask(model: Any, probe: Probe) -> None:
    ids, mask = padded()
    model(ids, attention_mask=mask)
    got = probe.masks[0]
    assert not MASK_ARGS - set(got), RELIES + f"mask function keywords {sorted(MASK_ARGS)}; saw {sorted(got)}"
    assert {"q_length", "q_offset"} <= set(got) or "cache_position" in got, (
        RELIES + "q_length and q_offset, or cache_position"
    )
    same = got["attention_mask"].dtype == torch.bool and torch.equal(got["attention_mask"], mask.bool())
    assert same, RELIES + "the mask function gets the whole 2D padding mask as bool"
    assert got["config"]._attn_implementation == NAME, RELIES + "the mask function gets the config"
    assert all(c["mask"] is got["attention_mask"] for c in probe.calls), (
        RELIES + "its result arrives untouched (a 2D mask)"
    )


@pytest.mark.parametrize("result", [None, "an opaque object"])
def test_mask_result_passes_untouched(model: Any, probe: Probe, result: Any) -> None:
    probe.mask_result = lambda kwargs: result
    ids, mask = padded()
    model(ids, attention_mask=mask)
    assert [c["mask"] for c in probe.calls] == [result] * LAYERS, (
        RELIES + "any result of the mask function passes through"
    )


def test_4d_mask_bypasses_the_mask_function(model: Any, probe: Probe) -> None:
    mask = torch.zeros(1, 1, 9, 9)
    model(make_ids(), attention_mask=mask, use_cache=False)
    bypass = not probe.masks and all(c["mask"] is mask for c in probe.calls)
    assert bypass, RELIES + "a 4D mask bypasses the mask function (so the pre-hook must refuse it)"


def test_packed_positions_are_announced(model: Any, probe: Probe) -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    model(make_ids(), position_ids=positions, use_cache=False)
    assert probe.masks[0]["allow_is_causal_skip"] is False, (
        RELIES + "packed position_ids set allow_is_causal_skip=False"
    )
    model(make_ids(), use_cache=False)
    assert probe.masks[-1]["allow_is_causal_skip"] is True, RELIES + "a plain forward has allow_is_causal_skip=True"


def test_packed_positions_with_a_cache_are_not_announced(model: Any, probe: Probe) -> None:
    hook = hook_base(model)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    model(make_ids(), position_ids=positions, **{CACHE: ProbeCache(probe.log)})
    assert probe.masks[0]["allow_is_causal_skip"] is True, RELIES + "with a cache the mask function cannot see packing"
    assert hook.inputs()["position_ids"] is positions, (
        RELIES + "packing is visible in position_ids at the base pre-hook"
    )


def test_mask_sizes_count_slots(model: Any, probe: Probe) -> None:
    cache = ProbeCache(probe.log)
    model(make_ids(length=6), **{CACHE: cache})
    model(make_ids(length=3), **{CACHE: cache})
    got = probe.masks[-1]
    assert (got["kv_length"], got["kv_offset"]) == (9, 0), (
        RELIES + "kv_length, kv_offset come from layer.get_mask_sizes"
    )
    start = got["q_offset"] if "q_offset" in got else got["cache_position"][0]
    assert int(start) == 6, RELIES + "the query offset is cache.get_seq_length()"


# ----------------------------------------------------------------------------------------- 4. the base model's pre-hook


def test_base_model_is_get_decoder(model: Any) -> None:
    same = model.get_decoder() is model.model is model.base_model and hasattr(model.get_decoder(), "layers")
    assert same, RELIES + "get_decoder() is the base model that holds .layers"


def test_pre_hook_sees_keywords_only(model: Any, probe: Probe) -> None:
    hook = hook_base(model)
    ids, mask = padded()
    model(ids, mask)
    args, kwargs = hook.seen[0]
    assert not args and not BASE_INPUTS - set(kwargs), (
        RELIES + f"the base model is called with keywords {BASE_INPUTS}; saw {kwargs}"
    )
    assert kwargs["input_ids"] is ids and kwargs["attention_mask"] is mask, (
        RELIES + "inputs reach the base pre-hook untouched"
    )
    assert kwargs["use_cache"] is None and kwargs[CACHE] is None, RELIES + "unset inputs arrive as None"


def test_direct_base_call_can_be_bound_to_names(model: Any, probe: Probe) -> None:
    hook, ids = hook_base(model), make_ids()
    model.get_decoder()(ids)
    bound = inspect.signature(model.get_decoder().forward).bind_partial(*hook.seen[0][0]).arguments
    assert bound.get("input_ids") is ids, RELIES + "positional arguments of the base forward bind to its signature"


def test_pre_hook_can_replace_inputs(model: Any, probe: Probe) -> None:
    cache, positions = ProbeCache(probe.log), torch.arange(5, 14)[None]
    hook_base(model, **{CACHE: cache}, position_ids=positions, attention_mask=None, use_cache=True)
    out = model(make_ids(), attention_mask=torch.ones(1, 9, dtype=torch.long))
    assert out[CACHE] is cache, RELIES + "the cache injected by the base pre-hook is used and returned"
    assert cache.get_seq_length() == 9, RELIES + "the injected cache is filled"
    assert probe.masks[0]["attention_mask"] is None, RELIES + "the pre-hook can replace attention_mask"


def test_cache_is_injected_even_without_use_cache(model: Any, probe: Probe) -> None:
    cache = ProbeCache(probe.log)
    hook_base(model, **{CACHE: cache})
    model(make_ids(), use_cache=False)
    assert cache.get_seq_length() == 9, RELIES + "use_cache does not guard update: the pre-hook itself must not inject"


@pytest.mark.parametrize("use_cache", [True, False])
def test_use_cache_none_means_the_config(probe: Probe, family: str, use_cache: bool) -> None:
    out = make_model(family, use_cache=use_cache)(make_ids())
    assert (out.get(CACHE) is not None) is use_cache, RELIES + "use_cache=None resolves to config.use_cache"


def test_positions_come_from_the_cache(model: Any, probe: Probe) -> None:
    cache, rotary = ProbeCache(probe.log), []
    seen = lambda m, args, kwargs: rotary.append(kwargs.get("position_ids", args[-1]))  # noqa: E731
    model.get_decoder().rotary_emb.register_forward_pre_hook(seen, with_kwargs=True)
    model(make_ids(length=6), **{CACHE: cache})
    model(make_ids(length=3), **{CACHE: cache})
    assert rotary[-1].tolist() == [[6, 7, 8]], RELIES + "missing position_ids start at cache.get_seq_length()"


def test_output_attentions_is_visible_to_the_pre_hook(model: Any, probe: Probe) -> None:
    hook = hook_base(model)
    model(make_ids(), output_attentions=True)
    assert hook.inputs().get("output_attentions") is True, (
        RELIES + "output_attentions=True is a keyword of the base forward"
    )
    with pytest.raises(ValueError):
        model.config.output_attentions = True


def test_output_attentions_of_generate_is_visible(model: Any, probe: Probe) -> None:
    hook = hook_base(model)
    generate(model, make_ids(), output_attentions=True, return_dict_in_generate=True)
    assert hook.inputs().get("output_attentions") is True, (
        RELIES + "generate(output_attentions=True) passes it to every forward"
    )


# ---------------------------------------------------------------------------------------------------------- 5. generate


def test_prepare_cache_is_looked_up_on_the_instance(model: Any, probe: Probe) -> None:
    maker = give_cache(model)
    out = generate(model, make_ids(), return_dict_in_generate=True)
    assert len(maker.args) == 5 and not maker.kwargs, (
        RELIES + "_prepare_cache_for_generation gets five positional arguments"
    )
    assert maker.args[1][CACHE] is out[CACHE], RELIES + f"model_kwargs['{CACHE}'] is the cache used"
    assert out[CACHE].get_seq_length() == 9 + 3, RELIES + "the cache holds all tokens but the last"
    batch, length = maker.args[3:]
    assert (batch, length) == (1, 9 + 4 - 1), (
        RELIES + "arguments 4 and 5 are the batch size and the maximum cache length"
    )


def test_prepare_cache_signature(model: Any) -> None:
    names = list(inspect.signature(model._prepare_cache_for_generation).parameters)
    expected = ["generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"]
    assert names == expected, RELIES + f"_prepare_cache_for_generation{expected}; saw {names}"


def test_override_survives_deepcopy_and_pickle(model: Any, probe: Probe) -> None:
    give_cache(model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        kept = isinstance(clone.__dict__.get("_prepare_cache_for_generation"), CacheMaker)
        assert kept, RELIES + "a callable object set on the instance survives deepcopy and pickle"


def test_pre_hook_survives_deepcopy_and_pickle(model: Any, probe: Probe) -> None:
    hook_base(model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        hooks = list(clone.get_decoder()._forward_pre_hooks.values())
        assert [type(h) for h in hooks] == [BaseHook], RELIES + "a forward pre-hook object survives deepcopy and pickle"


def test_batch_is_expanded_before_the_cache_is_made(model: Any, probe: Probe) -> None:
    give_cache(model)
    generate(model, make_ids(batch=2), num_beams=3)
    first = probe.calls[0]["query"]
    assert first.shape[0] == 6, RELIES + "inputs are expanded to batch x beams before the first forward"


def test_user_cache_wins(model: Any, probe: Probe) -> None:
    cache = ProbeCache(probe.log)
    out = generate(model, make_ids(), **{CACHE: cache}, return_dict_in_generate=True)
    assert out[CACHE] is cache, RELIES + "a cache passed to generate is used"
    assert getattr(cache, "_is_user_defined", True) is True, RELIES + "the original method may mark it _is_user_defined"


def test_user_cache_is_in_model_kwargs(model: Any, probe: Probe) -> None:
    cache, seen = ProbeCache(probe.log), []
    model._prepare_cache_for_generation = lambda config, kwargs, *rest: seen.append(kwargs.get(CACHE))
    out = generate(model, make_ids(), **{CACHE: cache}, return_dict_in_generate=True)
    assert seen[0] is cache and out[CACHE] is cache, RELIES + "a user cache is visible in model_kwargs"


def test_use_cache_false_reaches_the_override(model: Any, probe: Probe) -> None:
    seen = []
    model._prepare_cache_for_generation = lambda config, kwargs, *rest: seen.append(config.use_cache)
    hook = hook_base(model)
    generate(model, make_ids(), use_cache=False)
    assert seen == [False], RELIES + "generation_config.use_cache is False in the override"
    assert [k["use_cache"] for _, k in hook.seen] == [False] * 4, RELIES + "use_cache=False reaches the base pre-hook"
    assert hook.inputs(1)["input_ids"].shape[1] == 10, RELIES + "without a cache every step reads the whole row"


def test_use_cache_false_with_a_cache_reads_the_whole_text_over_it(model: Any, probe: Probe) -> None:
    hook = hook_base(model)
    with contextlib.suppress(RuntimeError):  # 5.0: the mask is narrower than the cache, a kernel may choke on it
        generate(model, make_ids(), use_cache=False, **{CACHE: ProbeCache(probe.log)})
    steps = [(past, kwargs["input_ids"].shape[1]) for past, (_, kwargs) in zip(hook.past, hook.seen, strict=True)]
    assert steps[1] == (9, 10), RELIES + f"use_cache=False with a cache goes wrong (so we refuse it); saw {steps}"


def test_mask_of_ones_is_dropped_or_kept_whole(model: Any, probe: Probe) -> None:
    give_cache(model)
    hook = hook_base(model)
    generate(model, make_ids())
    for step, (_, kwargs) in enumerate(hook.seen):
        mask = kwargs["attention_mask"]
        whole = mask is None or (mask.shape == (1, 9 + step) and bool(mask.all()))
        assert whole, RELIES + "a mask of ones arrives as None or as the whole 2D mask [B, seen + new]"


def test_padding_mask_grows_by_one_column(model: Any, probe: Probe) -> None:
    give_cache(model)
    hook = hook_base(model)
    ids, mask = padded()
    generate(model, ids, attention_mask=mask)
    shapes = [tuple(kwargs["attention_mask"].shape) for _, kwargs in hook.seen]
    assert shapes == [(2, 9 + i) for i in range(4)], (
        RELIES + f"the 2D mask covers seen + new tokens in every step; saw {shapes}"
    )
    first = hook.inputs()["position_ids"]
    assert first[1, 4:].tolist() == [0, 1, 2, 3, 4], RELIES + "positions of a left-padded row count its real tokens"
    steps = [kwargs["input_ids"].shape[1] for _, kwargs in hook.seen]
    assert steps == [9, 1, 1, 1], RELIES + "after prefill each step brings one token"


def test_beam_search_reorders_the_cache(model: Any, probe: Probe) -> None:
    maker = give_cache(model)
    generate(model, make_ids(batch=2), num_beams=3)
    found = logged(maker.log, "reorder")
    ok = found and all(index.dtype in (torch.int32, torch.int64) and index.shape == (6,) for index in found)
    assert ok, RELIES + "beam search calls cache.reorder_cache(integer tensor of batch x beams), int32 in practice"


def check_crops(log: list[tuple[str, Any]], seen: int) -> None:
    found = logged(log, "crop")
    assert found, RELIES + "assisted decoding rolls back with cache.crop"
    kept = [have + n if n <= 0 else n for n, have in found]
    ok = all(seen <= k <= have for k, (_, have) in zip(kept, found, strict=True))
    assert ok, RELIES + f"crop(n): n <= 0 removes -n tokens, n > 0 is an absolute length; saw (n, seen) {found}"


def test_prompt_lookup_crops(model: Any, probe: Probe) -> None:
    maker = give_cache(model)
    ids = make_ids(length=4).repeat(1, 4)
    plain = generate(make_model(model.config.model_type), ids, new=12)
    out = generate(model, ids, new=12, prompt_lookup_num_tokens=3)
    assert torch.equal(out, plain), RELIES + "prompt lookup gives the tokens of greedy decoding"
    check_crops(maker.log, 16)
    recorded = logged(maker.log, "record")
    assert recorded in ([], list(range(LAYERS))), (
        RELIES + "activate_past_recording is called once per layer, or not known (old)"
    )


def test_assistant_model_crops(model: Any, probe: Probe) -> None:
    assistant, ids = make_model(model.config.model_type), make_ids()
    makers = give_cache(model), give_cache(assistant)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    plain = generate(make_model(model.config.model_type), ids, new=10)
    out = generate(model, ids, new=10, assistant_model=assistant)
    assert torch.equal(out, plain), RELIES + "assisted decoding gives the tokens of greedy decoding"
    check_crops(makers[0].log, 9)


def test_first_drafts_come_with_the_prompt(model: Any, probe: Probe) -> None:
    """Unless ``get_candidates`` of what ``_get_candidate_generator`` makes gives none, which is a rejection."""
    model.generation_config.eos_token_id = -1
    hook = hook_base(model)
    ids = make_ids(length=4).repeat(1, 4)
    plain = generate(model, ids, new=6)
    steps = len(hook.seen)
    generate(model, ids, new=6, prompt_lookup_num_tokens=3)
    lengths = [kwargs["input_ids"].shape[1] for _, kwargs in hook.seen[steps:]]
    assert lengths[0] == 19, RELIES + f"the first forward of assisted decoding has the first drafts; saw {lengths}"
    make = model._get_candidate_generator

    def without_drafts(*args: Any, **kwargs: Any) -> Any:
        drafts = make(*args, **kwargs)
        drafts.get_candidates = lambda input_ids, *_, **__: (input_ids, None)
        return drafts

    model._get_candidate_generator = without_drafts
    del hook.seen[:]
    out = generate(model, ids, new=6, prompt_lookup_num_tokens=3)
    lengths = [kwargs["input_ids"].shape[1] for _, kwargs in hook.seen]
    assert torch.equal(out, plain) and lengths[:2] == [16, 1], (
        RELIES + "no drafts are taken as drafts that were rejected"
    )


@pytest.mark.parametrize("padding", [False, True])
def test_prefill_chunks(model: Any, probe: Probe, padding: bool) -> None:
    give_cache(model)
    hook = hook_base(model)
    ids, mask = padded() if padding else (make_ids(batch=2), torch.ones(2, 9, dtype=torch.long))
    plain = generate(make_model(model.config.model_type), ids, attention_mask=mask)
    out = generate(model, ids, attention_mask=mask, prefill_chunk_size=4)
    steps = [kwargs["input_ids"].shape[1] for _, kwargs in hook.seen]
    assert steps == [4, 4, 1, 1, 1, 1], RELIES + f"prefill_chunk_size calls the model chunk by chunk; saw {steps}"
    for past, new, (_, kwargs) in zip(hook.past, steps, hook.seen, strict=True):
        found, positions = kwargs["attention_mask"], kwargs["position_ids"]
        good = positions is None or positions[0].tolist() == list(range(past, past + new))
        assert good, RELIES + f"each chunk's position_ids continue the cache (5.2 is broken); saw {positions} at {past}"
        assert found is None or found.shape == (2, past + new), RELIES + "each chunk's 2D mask covers seen + new tokens"
    assert torch.equal(out, plain), RELIES + "chunked prefill gives the tokens of one prefill"


def test_next_turn_feeds_only_new_tokens(model: Any, probe: Probe) -> None:
    give_cache(model)
    hook = hook_base(model)
    first = generate(model, make_ids(), return_dict_in_generate=True)
    del model._prepare_cache_for_generation
    turn = torch.cat([first.sequences, make_ids(length=5)], dim=1)
    start = len(hook.seen)
    second = generate(model, turn, **{CACHE: first[CACHE]})
    fed, past = hook.inputs(start), hook.past[start]
    assert past == 12 and fed["input_ids"].shape[1] == 18 - 12, (
        RELIES + "with a filled cache generate feeds only new tokens"
    )
    plain = generate(make_model(model.config.model_type), turn)
    assert torch.equal(second, plain), RELIES + "a continued cache gives the tokens of a fresh one"


def test_chunks_with_a_filled_cache_can_be_recognised(model: Any, probe: Probe) -> None:
    """Old versions feed the whole row again here, at wrong positions; new ones only new tokens. A pre-hook can tell."""
    give_cache(model)
    first = generate(model, make_ids(), return_dict_in_generate=True)
    del model._prepare_cache_for_generation
    hook = hook_base(model)
    turn = torch.cat([first.sequences, make_ids(length=5)], dim=1)
    with contextlib.suppress(RuntimeError):  # 5.0: the mask is narrower than the cache, a kernel may choke on it
        generate(model, turn, new=1, **{CACHE: first[CACHE]}, prefill_chunk_size=4)
    fed, mask = hook.inputs(), hook.inputs()["attention_mask"]
    new = fed["input_ids"].shape[1]
    width = None if mask is None else mask.shape[1]
    start = fed["position_ids"]
    right = torch.equal(fed["input_ids"], turn[:, 12 : 12 + new])
    wrong = (width is not None and width != 12 + new) or (start is not None and int(start[0, 0]) != 12)
    assert right or wrong, (
        RELIES + "a chunk that does not continue the cache shows in the mask width or in position_ids"
    )


def test_no_auto_compile_for_our_cache(model: Any, probe: Probe) -> None:
    config = transformers.GenerationConfig(compile_config=transformers.CompileConfig())
    config.compile_config._compile_all_devices = True
    static = StaticCache(config=model.config, max_cache_len=32)
    asked = [model._valid_auto_compile_criteria({CACHE: c}, config) for c in (ProbeCache([]), static)]
    assert asked == [False, True], RELIES + "generate compiles by itself only when cache.is_compileable"


def test_is_compileable_tells_caches_apart(family: str) -> None:
    config = make_config(family)
    assert StaticCache(config=config, max_cache_len=16).is_compileable is True, (
        RELIES + "a static cache has is_compileable=True"
    )
    assert DynamicCache(config=config).is_compileable is False, RELIES + "a dynamic cache has is_compileable=False"
    assert ProbeCache([]).is_compileable is False, RELIES + "Cache.is_compileable follows its layers"


def test_dynamic_cache_hands_on_plain_tensors(model: Any, probe: Probe) -> None:
    cache = DynamicCache(config=model.config)
    model(make_ids(), **{CACHE: cache})
    assert isinstance(probe.calls[0]["key"], torch.Tensor), (
        RELIES + "a foreign cache hands plain tensors to our function"
    )


# -------------------------------------------------------------------------------------------- 6. configuration, loading


def test_models_share_their_config_object(family: str) -> None:
    config = make_config(family)
    one, two = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    cls = type(one)
    one, two = cls(config), cls(config)
    assert one.config is two.config is config, (
        RELIES + "two models may share one config (so patching takes a private copy)"
    )


def test_submodules_hold_the_same_config(model: Any) -> None:
    holders = [m for m in model.modules() if getattr(m, "config", None) is not None]
    assert all(m.config is model.config for m in holders), RELIES + "all submodules hold the model's own config object"
    kinds = {type(m).__name__ for m in attentions(model)}
    assert kinds <= {type(m).__name__ for m in holders}, RELIES + "attention modules hold it as .config"


def test_private_config_copy_is_independent(model: Any, probe: Probe) -> None:
    old, new = model.config, copy.deepcopy(model.config)
    assert new._attn_implementation == NAME, RELIES + "a deep copy of the config keeps _attn_implementation"
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.config = new
    old._attn_implementation = "sdpa"
    model(make_ids(), use_cache=False)
    ours = model.config._attn_implementation == NAME and probe.calls
    assert ours, RELIES + "after swapping the config in every submodule the old object has no influence"


def test_set_attn_implementation(model: Any, probe: Probe) -> None:
    model.set_attn_implementation("sdpa")
    model(make_ids(), use_cache=False)
    assert not probe.calls, RELIES + "set_attn_implementation switches our function off"
    model.set_attn_implementation(NAME)
    model(make_ids(), use_cache=False)
    assert probe.calls, RELIES + "set_attn_implementation accepts a registered name"
    with pytest.raises((ValueError, KeyError)):
        model.set_attn_implementation("never_registered")


def test_unknown_loading_flag_is_a_type_error(probe: Probe, family: str, tmp_path: Any) -> None:
    make_model(family).save_pretrained(tmp_path)
    with pytest.raises(TypeError):
        AutoModelForCausalLM.from_pretrained(tmp_path, longctx="auto")
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_extra_config_key_survives_saving(probe: Probe, family: str, tmp_path: Any) -> None:
    spec = {"heads": {"roles": ["RS", "SR"]}, "prefill": {"min_tokens": 4096}}
    model = make_model(family)
    model.config.longctx = spec
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.longctx == spec, (
        RELIES + "config.longctx (nested data) survives save_pretrained and from_pretrained"
    )
    text = (tmp_path / "config.json").read_text()
    assert NAME not in text, RELIES + "the attention implementation is not saved (a saved model loads without us)"
    assert loaded.config._attn_implementation != NAME


def test_config_flag_overrides_the_saved_key(probe: Probe, family: str, tmp_path: Any) -> None:
    model = make_model(family)
    model.config.longctx = {"a": 1}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, longctx=False)
    assert loaded.config.longctx is False, (
        RELIES + "with a saved key, an unpopped flag would overwrite it (so we pop it)"
    )


# ---------------------------------------------------------------------------------------------- 7. modules and geometry


def test_attention_module_attributes(model: Any) -> None:
    for i, module in enumerate(attentions(model)):
        found = module.layer_idx, module.head_dim, module.num_key_value_groups, module.scaling, module.is_causal
        assert found == (i, 8, 2, 8**-0.5, True), (
            RELIES + f"layer_idx, head_dim, groups, scaling, is_causal; saw {found}"
        )
        heads = module.k_proj.weight.shape[0] // module.head_dim
        assert heads == 2, RELIES + "k_proj.weight rows / head_dim = KV heads held by this process"


def test_qwen2_has_biases_and_qwen3_has_norms(model: Any, family: str) -> None:
    module = attentions(model)[0]
    bias, norm = module.k_proj.bias is not None, hasattr(module, "k_norm")
    assert (bias, norm) == (family == "qwen2", family == "qwen3"), RELIES + "q/k biases and norms act before update"


def test_rope_parameters_location(family: str) -> None:
    config = make_config(family, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("rope_theta", getattr(config, "rope_theta", None))
    assert theta == 5e5, RELIES + "rope_theta is in config.rope_parameters"
    assert rope.get("rope_type") == "default", RELIES + "rope_type is in config.rope_parameters"


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "linear": {"rope_type": "linear", "factor": 4.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_angles_that_depend_on_the_length(probe: Probe, kind: str) -> None:
    rope = {**ROPES[kind], "rope_theta": 1e4}
    length = 8 if kind != "yarn" else 32
    model = make_model("llama", rope_parameters=rope, max_position_embeddings=length)

    def angles(*lengths: int) -> list[torch.Tensor]:
        rotary, x = model.model.rotary_emb, torch.zeros(1, 1)
        return [rotary(x, torch.arange(n)[None])[0][0, :4].clone() for n in lengths]

    below, at, above, far = angles(4, 8, 9, 20)
    assert torch.equal(below, at), RELIES + "up to the limit angles are always the same"
    assert torch.equal(at, above) is (kind not in ("dynamic", "longrope")), RELIES + f"beyond it, {kind}"
    assert torch.equal(above, far) is (kind != "dynamic"), RELIES + f"far beyond it, {kind}"


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_kind_and_the_limit_are_in_rope_parameters(kind: str) -> None:
    config = make_config("llama", rope_parameters={**ROPES[kind], "rope_theta": 1e4}, max_position_embeddings=8)
    assert config.rope_parameters["rope_type"] == kind, RELIES + "config.rope_parameters['rope_type']"
    limit = config.rope_parameters.get("original_max_position_embeddings", config.max_position_embeddings)
    assert limit == 8, RELIES + "the limit is original_max_position_embeddings, or max_position_embeddings"


def sliding_model(family: str, implementation: str = NAME) -> Any:
    if family == "mistral":
        return make_model(family, implementation, sliding_window=4)
    types = ["full_attention", "sliding_attention"]
    return make_model(family, implementation, sliding_window=4, use_sliding_window=True, layer_types=types)


@pytest.mark.parametrize("family", SLIDING)
def test_sliding_layers(probe: Probe, family: str) -> None:
    model = sliding_model(family)
    ids = make_ids()
    out = model(ids, use_cache=False)
    windows = [c["kwargs"]["sliding_window"] for c in probe.calls]
    assert windows == ([4, 4] if family == "mistral" else [None, 4]), (
        RELIES + f"sliding_window is a keyword; saw {windows}"
    )
    expected = sliding_model(family, "sdpa")(ids, use_cache=False)
    assert torch.allclose(out.logits, expected.logits, atol=1e-5), RELIES + "a window of w reads the last w keys"
    types = getattr(model.config, "layer_types", None)
    by_config = [
        model.config.sliding_window if t == "sliding_attention" else None for t in types or ["sliding_attention"] * 2
    ]
    assert by_config == windows, (
        RELIES + "config.layer_types (or sliding_window alone: every layer) names sliding layers"
    )
    names = [getattr(m, "sliding_window", "absent") for m in attentions(model)]
    assert names == (["absent"] * 2 if family == "mistral" else windows), (
        RELIES + f"module.sliding_window in Qwen; saw {names}"
    )


def test_no_window_is_none(model: Any, probe: Probe, family: str) -> None:
    model(make_ids(), use_cache=False)
    windows = [c["kwargs"].get("sliding_window") for c in probe.calls]
    assert windows == [None, None], RELIES + f"without a window sliding_window is None or absent; saw {windows}"


@pytest.mark.parametrize("way", ["generate_batch", "paged"])
def test_batches_start_with_init_continuous_batching_of_the_instance(model: Any, probe: Probe, way: str) -> None:
    class Asked(Exception):
        pass

    def init(*args: Any, **kwargs: Any) -> None:
        raise Asked

    model.init_continuous_batching = init
    with pytest.raises(Asked):
        if way == "paged":
            generate(model, make_ids(), cache_implementation="paged")
        else:
            model.generate_batch([[3, 4, 5]], generation_config=model.generation_config)
