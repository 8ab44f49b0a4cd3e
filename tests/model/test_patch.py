"""Patching is per instance, reversible, idempotent, and survives copies, pickles, PEFT and shared configs."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers.tiny import FAMILIES, config_for, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM

import hf_longctx.model.attention
from hf_longctx import (
    ConfigError,
    LongCtxCache,
    UnsupportedModelError,
    observe,
    patch_model,
    patched,
    report,
    unpatch_model,
)

IDS = torch.arange(3, 63)[None]


def logits(model, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **kwargs).logits


def kinds(model) -> str:
    with torch.no_grad():
        return type(model(IDS).past_key_values).__name__


def traces(model) -> tuple:
    """What patching touches: configs, hooks and instance attributes of every module."""
    return tuple(
        (name, id(getattr(m, "config", None)), tuple(m._forward_pre_hooks), tuple(sorted(m.__dict__)))
        for name, m in model.named_modules()
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_unpatching_puts_everything_back(family, implementation):
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    before, want, own = traces(model), logits(model), model.config.to_dict()
    patch_model(model, config_for(model, "mixed"))
    assert not torch.equal(logits(model), want)
    assert traces(model) != before
    unpatch_model(model)
    assert traces(model) == before
    assert torch.equal(logits(model), want)
    assert (model.config.to_dict(), model.config._attn_implementation) == (own, implementation)
    assert unpatch_model(model) is model


def test_the_context_manager_undoes_also_after_an_exception():
    model = tiny_model()
    before, want = traces(model), logits(model)
    with pytest.raises(ZeroDivisionError), patched(model, config_for(model, "mixed")):
        assert not torch.equal(logits(model), want)
        1 / 0  # noqa: B018
    assert traces(model) == before
    patch_model(model, config_for(model, "streaming"))
    streaming = logits(model)
    with patched(model, config_for(model, "retrieval")):
        torch.testing.assert_close(logits(model), want)
    assert torch.equal(logits(model), streaming)


def test_patching_again_replaces_the_config():
    model = tiny_model()
    want = logits(model)
    hooks = len(model.base_model._forward_pre_hooks)
    for roles in ("streaming", "mixed", "retrieval"):
        assert patch_model(model, config_for(model, roles)) is model
    torch.testing.assert_close(logits(model), want)
    assert len(model.base_model._forward_pre_hooks) == hooks + 1
    patch_model(model, config_for(model, "mixed"), stores={"streaming": {"recent": 9}})
    assert model.config.longctx["stores"]["streaming"] == {"store": "sink_recent", "sink": 4, "recent": 9}


def test_a_failed_patch_changes_nothing():
    model = tiny_model()
    before = traces(model)
    with pytest.raises(ValueError, match="sink"):
        patch_model(model, config_for(model, "mixed"), stores={"streaming": {"sink": -1}})
    assert traces(model) == before


def test_models_that_share_a_config_object(monkeypatch):
    config = tiny_config("llama")
    ours, other = (AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval() for _ in range(2))
    calls = []
    attend = hf_longctx.model.attention.attend
    monkeypatch.setattr(hf_longctx.model.attention, "attend", lambda *a, **k: calls.append(a) or attend(*a, **k))
    want = logits(other)
    patch_model(ours, config_for(ours, "mixed"))
    assert torch.equal(logits(other), want)
    assert not calls
    assert other.config._attn_implementation == "sdpa"
    logits(ours)
    assert len(calls) == 3
    AttentionInterface.register("longctx", attend)


def test_a_deep_copy_is_a_patched_model_of_its_own():
    model = tiny_model()
    patch_model(model, config_for(model, "mixed"))
    want, twin = logits(model), copy.deepcopy(model)
    unpatch_model(model)
    assert torch.equal(logits(twin), want)
    assert kinds(twin) == "LongCtxCache"
    assert isinstance(twin.generate(IDS, max_new_tokens=2, return_dict_in_generate=True).past_key_values, LongCtxCache)
    assert twin._prepare_cache_for_generation.model is twin
    told = report(twin)
    assert not told.alive and told.seen == 60 and told.nbytes is not None, "that cache is gone, its numbers were noted"
    unpatch_model(twin)
    assert torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize("way", [pytest.param("pickle", marks=pytest.mark.slow), "torch.save"])
def test_a_saved_object_is_patched_in_a_new_process(way, tmp_path):
    model = tiny_model()
    patch_model(model, config_for(model, "mixed"))
    out = model.generate(IDS, max_new_tokens=4, return_dict_in_generate=True)
    if way == "pickle":
        (tmp_path / "model").write_bytes(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model")
    script = f"""
        import pickle, sys, torch
        path = {str(tmp_path / "model")!r}
        model = pickle.load(open(path, "rb")) if {way!r} == "pickle" else torch.load(path, weights_only=False)
        out = model.generate(torch.arange(3, 63)[None], max_new_tokens=4, return_dict_in_generate=True)
        print(out.sequences[0].tolist(), type(out.past_key_values).__name__, out.past_key_values.nbytes)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    want = f"{out.sequences[0].tolist()} LongCtxCache {out.past_key_values.nbytes}"
    assert done.stdout.strip().splitlines()[-1] == want


@pytest.mark.parametrize("roles", ["retrieval", "mixed"])
def test_lora_before_and_after_patching(roles):
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)

    def adapted():
        torch.manual_seed(3)
        model = tiny_model()
        torch.manual_seed(4)
        return get_peft_model(model, lora).eval()

    before, after = adapted(), tiny_model()
    stock = before.generate(input_ids=IDS, max_new_tokens=6)
    patch_model(before, config_for(before, roles))
    torch.manual_seed(3)
    after = tiny_model()
    patch_model(after, config_for(after, roles))
    torch.manual_seed(4)
    after = get_peft_model(after, lora).eval()
    first, second = (
        model.generate(input_ids=IDS, max_new_tokens=6, return_dict_in_generate=True) for model in (before, after)
    )
    assert torch.equal(first.sequences, second.sequences)
    assert torch.equal(first.sequences, stock) == (roles == "retrieval")
    assert {type(out.past_key_values) for out in (first, second)} == {LongCtxCache}
    with before.disable_adapter():
        plain = before.generate(input_ids=IDS, max_new_tokens=6)
    merged = before.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=IDS, max_new_tokens=6), first.sequences)
    assert not torch.equal(plain, first.sequences)
    unpatch_model(merged)
    assert torch.equal(merged.generate(input_ids=IDS, max_new_tokens=6), stock)


def test_the_base_model_alone():
    model = AutoModel.from_config(tiny_config("qwen2"), attn_implementation="sdpa").eval()
    want = model(IDS).last_hidden_state
    patch_model(model, config_for(model, "retrieval"))
    out = model(IDS)
    torch.testing.assert_close(out.last_hidden_state, want)
    assert isinstance(out.past_key_values, LongCtxCache)
    positional = model(IDS, None, None, None, None)
    assert isinstance(positional.past_key_values, LongCtxCache)


@pytest.mark.slow
def test_compile_with_graph_breaks_gives_the_same_tokens():
    model = tiny_model(layers=2)
    patch_model(model, config_for(model, "mixed"))
    want = logits(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled), want)
    assert isinstance(compiled(IDS).past_key_values, LongCtxCache)
    assert any("compile" in note for note in report(model).notes)


def test_observe_sees_every_key_and_may_replace_the_output():
    model = tiny_model(dtype=torch.float64)
    dense = logits(model)
    patch_model(model, config_for(model, "mixed"))
    mixed, seen = logits(model), []

    def watch(layer_idx, q, k, v, scaling, rows, compute):
        seen.append((layer_idx, tuple(q.shape), tuple(k.shape), tuple(v.shape), rows.total))

    with observe(model, watch):
        torch.testing.assert_close(logits(model), mixed)
        out = model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True)
    assert type(out.past_key_values).__name__ == "DynamicCache"
    assert seen[:3] == [(layer, (1, 8, 60, 8), (1, 4, 60, 8), (1, 4, 60, 8), 60) for layer in range(3)]
    assert seen[-1] == (2, (1, 8, 1, 8), (1, 4, 62, 8), (1, 4, 62, 8), 62)
    assert len(seen) == 3 * 4

    gate = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def mix(layer_idx, q, k, v, scaling, rows, compute):
        return (1 - gate) * compute("retrieval") + gate * compute("streaming")

    with observe(model, mix):
        out = model(IDS, use_cache=False).logits
        torch.testing.assert_close(out.detach(), dense)
        out.sum().backward()
        assert gate.grad.abs() > 0
    torch.testing.assert_close(logits(model), mixed)
    with pytest.raises(UnsupportedModelError, match="patch_model"), observe(tiny_model(), watch):
        pass


def test_report_says_what_ran():
    model = tiny_model()
    patch_model(model, config_for(model, "mixed"))
    assert "none yet" in str(report(model)) and "none alive" not in str(report(model))
    out = model(IDS)
    told = report(model)
    assert (told.kv_heads, told.retrieval_heads, told.forwards, told.kernels) == (12, 6, 1, ("cpu",))
    assert (told.nbytes, told.nbytes_dense, told.seen) == (
        out.past_key_values.nbytes,
        out.past_key_values.nbytes_dense,
        60,
    )
    assert sum(told.layers) == told.nbytes
    assert "6 of 12 keep every token" in str(told)
    model(IDS, past_key_values=None, use_cache=False)
    assert report(model).nbytes is None
    assert "none alive" in str(report(model))
    with pytest.raises(UnsupportedModelError, match="patch_model"):
        report(tiny_model())


def test_the_report_remembers_the_cache_that_generate_dropped():
    model = tiny_model()
    patch_model(model, config_for(model, "mixed"))
    made = model.generate(IDS, max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
    live = report(model)
    assert live.alive
    assert "gone" not in str(live)
    model.generate(IDS, max_new_tokens=40, do_sample=False)
    told = report(model)
    assert not told.alive
    assert "it is gone now" in str(told)
    # 60 tokens at the end of the prompt, noted again at 68, 77, 87 and 98: an eighth more each time.
    assert told.seen == 98
    assert sum(told.layers) == told.nbytes
    assert told.nbytes_dense * live.seen == live.nbytes_dense * told.seen
    del made
    assert (report(model).seen, report(model).nbytes) == (98, told.nbytes)
    model.generate(IDS, max_new_tokens=1)
    assert report(model).nbytes is None


def test_threads_share_a_model():
    from concurrent.futures import ThreadPoolExecutor

    model = tiny_model()
    patch_model(model, config_for(model, "mixed"))
    texts = [torch.randint(3, 97, (1, 20 + 7 * i)) for i in range(8)]
    want = [model.generate(text, max_new_tokens=8) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda text: model.generate(text, max_new_tokens=8), texts))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_buffers_are_not_part_of_the_weights():
    model = tiny_model()
    keys = set(model.state_dict())
    patch_model(model, config_for(model, "mixed"))
    logits(model)
    assert set(model.state_dict()) == keys
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)


def test_tokens_are_evicted_without_a_head_map():
    """One call, of a model for which no config ships."""
    model = tiny_model(layers=2)
    with pytest.raises(ConfigError, match="no shipped config fits"):
        patch_model(model, stores={"retrieval": {"store": "evicted", "budget": {"share": 0.3}}})
    patch_model(
        model, stores={"retrieval": {"store": "evicted", "budget": {"share": 0.3}}}, heads={"retrieval_fraction": 1.0}
    )
    model.generate(torch.randint(3, 97, (1, 1000)), max_new_tokens=3)
    found = report(model)
    assert found.retrieval_heads == found.kv_heads and 0.3 < found.nbytes / found.nbytes_dense < 0.4
    assert "no memory is saved" not in str(found)
