"""Models with layers that are not attention over the whole text: these go on as Transformers computes them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.every_family import CONVOLUTIONS, softmax_in_float64
from helpers.forgeries import Forger
from helpers.tiny import config_for
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import hf_longctx.cache.stock_layers
from hf_longctx import (
    CacheError,
    LongCtxCache,
    UnsupportedModeError,
    UnsupportedModelError,
    patch_model,
    report,
    unpatch_model,
)
from hf_longctx.cache.layer import LongCtxLayer
from hf_longctx.cache.seam import CACHE
from hf_longctx.model.modules import language_model
from hf_longctx.model.tiny import tiny_copy

MORE = {"lfm2": CONVOLUTIONS, "lfm2_moe": CONVOLUTIONS}
LINEAR = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid")
KINDS = [kind for kind in (*LINEAR, "llama4_text", "lfm2", "lfm2_moe") if kind in CONFIG_MAPPING_NAMES]
CUTS = (7, 20, 21, 22, 40, 60)


@pytest.fixture(autouse=True)
def _eager_in_float64(monkeypatch):
    softmax_in_float64(monkeypatch)


def hybrid(kind: str, **more):
    """A tiny random model on eager attention; linear attention computes in float32 whatever the dtype."""
    changes = {
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **MORE.get(kind, {}),
        **more,
    }
    config = tiny_copy(AutoConfig.for_model(kind), **changes)
    config._experts_implementation = "eager"
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def text(rows: int = 2, tokens: int = 60) -> torch.Tensor:
    return torch.randint(3, 97, (rows, tokens))


@torch.no_grad()
def read(model, ids, cuts=CUTS, cache=None, past: int = 0, mask=None) -> torch.Tensor:
    """The logits of all tokens, read in parts that end at ``cuts``; without a cache in one."""
    if cache is None:
        return model(ids, attention_mask=mask, use_cache=False).logits
    outs = []
    for end in cuts:
        given = {"attention_mask": None if mask is None else mask[:, :end], CACHE: cache}
        outs.append(model(ids[:, past:end], **given).logits)
        past = end
    return torch.cat(outs, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_all_heads_retrieval_equals_eager_in_one_read_and_in_parts(kind):
    model, ids = hybrid(kind), text()
    whole = read(model, ids)
    parts = read(model, ids, cache=DynamicCache(config=model.config))
    patch_model(model, config_for(model, "retrieval"))
    cache = LongCtxCache(model)
    assert (read(model, ids) - whole).abs().max() < 1e-10
    assert (read(model, ids, cache=cache) - parts).abs().max() < 1e-10
    types = model.config.layer_types
    assert [isinstance(one, LongCtxLayer) for one in cache.layers] == [one == "full_attention" for one in types]


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_heads_change_the_answer_and_take_less(kind):
    model, ids = hybrid(kind), text(1, 400)
    want = read(model, ids)
    sizes = []
    for roles in ("retrieval", "streaming"):
        patch_model(model, config_for(model, roles, sink=2, recent=6))
        cache = LongCtxCache(model, rollback=False)
        got = read(model, ids, (400,), cache)
        assert (got - want).abs().max() > 1e-3 or roles == "retrieval"
        sizes.append((cache.nbytes, cache.nbytes_dense, cache.stock_nbytes))
    (retrieval, dense, states), (streaming, same, same_states) = sizes
    assert (dense, states) == (same, same_states) and 0 < states < streaming < dense < retrieval


@pytest.mark.parametrize("kind", KINDS)
def test_a_left_padded_batch_equals_stock(kind):
    """Not its sequences alone: Llama 4's attention temperature counts pads, in Transformers as well."""
    model, ids = hybrid(kind), text()
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    model.set_attn_implementation("sdpa")
    whole = read(model, ids, mask=mask)
    parts = read(model, ids, (40, 41, 60), DynamicCache(config=model.config), mask=mask)
    patch_model(model, config_for(model, "retrieval"))
    for got, want in (
        (read(model, ids, mask=mask), whole),
        (read(model, ids, (40, 41, 60), LongCtxCache(model), mask=mask), parts),
    ):
        assert (got[0] - want[0]).abs().max() < 1e-10
        assert (got[1, 13:] - want[1, 13:]).abs().max() < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}], ids=str)
def test_generate_gives_the_tokens_of_stock(kind, more):
    model, ids = hybrid(kind), text(2, 30)
    asked = {"max_new_tokens": 10, "do_sample": False, **more}
    want = model.generate(ids, **asked)
    patch_model(model, config_for(model, "retrieval"))
    got = model.generate(ids, **asked, return_dict_in_generate=True)
    assert torch.equal(got.sequences, want)
    assert isinstance(getattr(got, CACHE), LongCtxCache)


@pytest.mark.parametrize("kind", KINDS)
def test_forks_copies_and_files_go_on_alike(kind, tmp_path):
    model, ids = hybrid(kind), text()
    patch_model(model, config_for(model, "mixed", sink=2, recent=6))
    cache = LongCtxCache(model)
    read(model, ids, (7, 30), cache)
    cache.save(tmp_path / "c.safetensors")
    fork, copied = cache.fork(), pickle.loads(pickle.dumps(cache))
    want = read(model, ids, (31, 60), cache, 30)
    for other in (fork, copied, LongCtxCache.load(tmp_path / "c.safetensors", model)):
        assert torch.equal(read(model, ids, (31, 60), other, 30), want)
        assert other.seen == 60


@pytest.mark.parametrize("kind", KINDS)
def test_reordered_repeated_and_selected_sequences(kind):
    model, ids = hybrid(kind), text(3, 40)
    patch_model(model, config_for(model, "mixed", sink=2, recent=6))
    want = read(model, ids, (30, 40), LongCtxCache(model))[:, 30:]
    changes = [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ]
    for change, rows in changes:
        cache = LongCtxCache(model)
        read(model, ids, (30,), cache)
        change(cache)
        assert (read(model, ids[rows], (40,), cache, 30) - want[rows]).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_was_reset_is_as_new(kind):
    model, ids = hybrid(kind), text()
    patch_model(model, config_for(model, "mixed", sink=2, recent=6))
    want = read(model, ids, cache=LongCtxCache(model))
    cache = LongCtxCache(model)
    read(model, text(3, 25), (25,), cache)
    cache.crop(0)
    cache.reset()
    assert torch.equal(read(model, ids, cache=cache), want)


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_back_what_transformers_can(kind):
    """A recurrent state cannot go back; the inputs of convolutions and a chunk can where they are recorded."""
    model, ids = hybrid(kind), text()
    patch_model(model, config_for(model, "retrieval"))
    want = read(model, ids, cache=LongCtxCache(model))
    cache = LongCtxCache(model)
    read(model, ids, (50,), cache)
    with pytest.raises(CacheError, match="cannot crop from 50 to 47 tokens.*in Transformers as well"):
        cache.crop(-3)
    assert cache.seen == 50 and cache.oldest_crop == 50
    cache = LongCtxCache(model)
    read(model, ids, (45,), cache)
    cache.activate_past_recording()
    read(model, ids, (50,), cache, 45)
    if kind in LINEAR:
        with pytest.raises(CacheError, match="LinearAttentionLayer"):
            cache.crop(-3)
        return
    cache.crop(-3)
    assert cache.seen == 47
    assert (read(model, ids, (60,), cache, 47) - want[:, 47:]).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_that_was_interrupted_is_noticed(kind, monkeypatch):
    """Between a layer that Transformers computes and the first of ours."""
    model, ids = hybrid(kind), text()
    patch_model(model, config_for(model, "retrieval"))
    cache = LongCtxCache(model)
    read(model, ids, (20,), cache)
    layer = language_model(model).layers[1]
    with monkeypatch.context() as patch:
        patch.setattr(layer.self_attn, "forward", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            read(model, ids, (30,), cache, 20)
    with pytest.raises(CacheError, match="an earlier forward was interrupted.*reset"):
        read(model, ids, (30,), cache, 20)
    cache.reset()
    read(model, ids, (30,), cache)


def _interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("past", [0, 20])
@pytest.mark.parametrize("kind", ["qwen3_next", "lfm2"])
def test_what_is_said_of_an_interrupted_forward_helps_wherever_it_was(kind, past, monkeypatch):
    """In each layer, of which the last is not ours."""
    other = "conv" if kind == "lfm2" else "linear_attention"
    types = [other, "full_attention"] * 2 + [other]
    model, ids = hybrid(kind, layer_types=types, num_hidden_layers=len(types)), text()
    patch_model(model, config_for(model, "retrieval"))
    for layer in language_model(model).layers:
        cache = LongCtxCache(model)
        if past:
            read(model, ids, (past,), cache)
        with monkeypatch.context() as patch:
            patch.setattr(getattr(layer, "mlp", None) or layer.feed_forward, "forward", _interrupted)
            with pytest.raises(KeyboardInterrupt):
                read(model, ids, (30,), cache, past)
        if layer is language_model(model).layers[-1]:  # every layer had read its tokens
            read(model, ids, (40,), cache, 30)
            continue
        with pytest.raises(CacheError, match="interrupted, and a layer without keys cannot go back.*reset"):
            read(model, ids, (40,), cache, 30)
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", _interrupted)  # before it read them
        with pytest.raises(KeyboardInterrupt):
            read(model, ids, (30,), cache := LongCtxCache(model))
    with pytest.raises(CacheError, match="layer 4 of this cache has read 0 tokens and the others 30"):
        read(model, ids, (40,), cache, 30)


@pytest.mark.parametrize("kind", ["qwen3_next", "lfm2"])
def test_states_of_inference_mode_are_continued_outside_of_it(kind, tmp_path):
    """As keys and values are: however the cache came to be there."""
    model, ids = hybrid(kind), text()
    patch_model(model, config_for(model, "mixed", sink=2, recent=6))
    read(model, ids, (30,), before := LongCtxCache(model))
    want = read(model, ids, (31, 60), before.fork(), 30)
    before.save(tmp_path / "c.safetensors")
    with torch.inference_mode():
        read(model, ids, (30,), filled := LongCtxCache(model))
        caches = [filled, before.fork(), copy.deepcopy(before), LongCtxCache.load(tmp_path / "c.safetensors", model)]
    for cache in caches:
        assert torch.equal(read(model, ids, (31, 60), cache, 30), want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_past_is_saved_however_short_it_is(kind, tmp_path):
    model, ids = hybrid(kind), text()
    patch_model(model, config_for(model, "retrieval"))
    for count in (1, 2, 30):
        cache = LongCtxCache(model)
        cache.activate_past_recording()
        read(model, ids, (count,), cache)
        cache.save(tmp_path / "c.safetensors")
        loaded = LongCtxCache.load(tmp_path / "c.safetensors", model)
        want = read(model, ids, (count + 1, 60), cache, count)
        assert (read(model, ids, (count + 1, 60), loaded, count) - want).abs().max() < 1e-10


def test_a_model_cut_before_its_first_attention_is_refused():
    model = hybrid("lfm2")
    patch_model(model, config_for(model, "retrieval"))
    with pytest.raises(UnsupportedModeError, match="first 1 layers .*assistant_early_exit"):
        model.generate(text(1, 20), max_new_tokens=4, do_sample=False, assistant_early_exit=1)


def test_no_sequence_is_realigned():
    model = hybrid(KINDS[0])
    patch_model(model, config_for(model, "retrieval"))
    cache = LongCtxCache(model)
    read(model, text(), (30,), cache)
    assert cache.stagger_room == 0


def test_unpatching_gives_the_layers_back():
    model, ids = hybrid("llama4_text"), text()
    want = read(model, ids)
    patch_model(model, config_for(model, "streaming", sink=2, recent=6))
    assert [module.longctx_stock for module in _attention(model)] == [True, False]
    unpatch_model(model)
    assert torch.equal(read(model, ids), want)
    assert not any("longctx_stock" in vars(module) or "longctx_plan" in vars(module) for module in model.modules())


def _attention(model):
    return [layer.self_attn for layer in language_model(model).layers]


def test_a_transformers_that_keeps_the_states_elsewhere_is_refused(monkeypatch):
    dense = DynamicCache(config=AutoConfig.for_model("llama", num_hidden_layers=9))
    monkeypatch.setattr(hf_longctx.cache.stock_layers, "DynamicCache", lambda config: dense)
    with pytest.raises(UnsupportedModelError, match="layer 0 of this qwen3_next .*cache of its own"):
        patch_model(hybrid("qwen3_next"), config_for(hybrid("qwen3_next"), "retrieval"))


def test_chunks_that_ask_for_what_sdpa_lacks_are_refused(monkeypatch):
    model, ids = hybrid("llama4_text"), text()
    patch_model(model, config_for(model, "retrieval"))
    attend = type(_attention(model)[0]).forward
    monkeypatch.setattr(
        _attention(model)[0], "forward", lambda *a, **k: attend(_attention(model)[0], *a, softcap=2.0, **k)
    )
    with pytest.raises(UnsupportedModeError, match="layer 0 .*left to Transformers' sdpa.*softcap"):
        read(model, ids)


@pytest.mark.parametrize("kind", ["qwen3_next", "llama4_text"])
def test_a_forged_state_is_refused(kind, tmp_path):
    """Every tensor of the other layers: of another shape or dtype, missing, or one more."""
    model = hybrid(kind)
    patch_model(model, config_for(model, "mixed", sink=2, recent=6))
    cache = LongCtxCache(model)
    read(model, text(), (30,), cache)
    cache.save(tmp_path / "true.safetensors")
    forger = Forger(tmp_path / "true.safetensors")
    forgeries = [(what, edit) for what, edit in forger.every() if what.startswith("stock.")]
    assert len(forgeries) > 10
    for what, edit in forgeries:
        with pytest.raises(CacheError):
            LongCtxCache.load(forger.write(tmp_path / "forged.safetensors", edit), model)
            pytest.fail(what)
    LongCtxCache.load(tmp_path / "true.safetensors", model)


def test_loading_leaves_no_trace_of_the_token_that_says_the_shapes(tmp_path):
    model = hybrid("qwen3_next")
    patch_model(model, config_for(model, "mixed", sink=2, recent=6))
    cache = LongCtxCache(model)
    read(model, text(), (30,), cache)
    cache.save(tmp_path / "c.safetensors")
    before = str(report(model))
    LongCtxCache.load(tmp_path / "c.safetensors", model)
    assert str(report(model)) == before
