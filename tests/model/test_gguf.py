"""A model that Transformers read straight from a GGUF file is patched as any other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from helpers.gguf_files import tiny_gguf
from helpers.pages import ROOT, snippets
from helpers.tiny import config_for
from transformers import LlamaForCausalLM

import hf_longctx
from hf_longctx import LongCtxCache, identify, patch_model, report, unpatch_model
from hf_longctx.model.modules import state_of

IDS = torch.arange(3, 60)[None]
FILE = "model.gguf"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[str, LlamaForCausalLM]:
    """(folder with a GGUF file, the model that it was made of)."""
    folder = tmp_path_factory.mktemp("gguf")
    return str(folder), tiny_gguf(folder / FILE)


@pytest.fixture
def loaded(tiny) -> LlamaForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny[0], gguf_file=FILE).eval()


@pytest.fixture
def other(tiny) -> LlamaForCausalLM:
    """The same weights, and nothing of GGUF about them; patched."""
    model = copy.deepcopy(tiny[1])
    patch_model(model, config_for(model))
    return model


def answer(model) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=6, do_sample=False)


def test_it_is_patched_answers_and_is_unpatched(loaded, tiny, other):
    assert loaded.is_quantized and hasattr(loaded.config, "quantization_config")
    patch_model(loaded, config_for(loaded))
    assert torch.equal(answer(loaded), answer(other)), "as the same weights from elsewhere"
    assert "6 of 12 keep every token" in str(report(loaded))
    assert torch.equal(loaded(IDS).logits, other(IDS).logits)
    assert not torch.equal(loaded(IDS).logits, tiny[1](IDS).logits), "a control: roles matter here"
    unpatch_model(loaded)
    assert torch.equal(loaded(IDS).logits, tiny[1](IDS).logits)


def test_copies_are_patched(loaded):
    patch_model(loaded, config_for(loaded))
    for one in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(answer(one), answer(loaded)) and state_of(one) is not state_of(loaded)


def test_saved_caches_fit_the_same_weights(loaded, other, tmp_path):
    patch_model(loaded, config_for(loaded))
    cache = LongCtxCache(loaded)
    loaded(IDS, past_key_values=cache)
    cache.save(tmp_path / "cache")
    more = torch.cat([IDS, torch.tensor([[5]])], 1)
    expected = loaded.generate(more, max_new_tokens=5, do_sample=False)
    for model in (loaded, other):
        again = LongCtxCache.load(tmp_path / "cache", model)
        assert torch.equal(model.generate(more, past_key_values=again, max_new_tokens=5, do_sample=False), expected)


@pytest.mark.parametrize("installed", [False, True])
def test_the_flag_takes_a_gguf_file(tiny, other, installed):
    load = transformers.AutoModelForCausalLM if installed else hf_longctx.AutoModelForCausalLM
    if installed:
        hf_longctx.install()
    try:
        model = load.from_pretrained(tiny[0], gguf_file=FILE, longctx=config_for(other).to_dict())
    finally:
        hf_longctx.uninstall()
    assert torch.equal(answer(model.eval()), answer(other))


def test_its_heads_are_measured_and_its_memory_is_planned(loaded, tiny):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny[0], gguf_file=FILE)
    config = identify(loaded, tokenizer, "echo_induction", tokens=40)
    assert len(config.heads.scores) == 3
    patch_model(loaded, config)
    assert hf_longctx.LongCtxConfig.plan(loaded, memory="1GB", context=1024).config.model == config.model


def test_the_page_says_how_to_save_it(loaded, tiny, other, tmp_path, monkeypatch):
    patch_model(loaded, config_for(loaded))
    with pytest.raises(ValueError, match="not serializable"):
        loaded.save_pretrained(tmp_path / "refused")
    monkeypatch.chdir(tmp_path)
    (block,) = [one for one in snippets(ROOT / "docs" / "faq.md") if "gguf_file=" in one.text]
    names = {"folder": tiny[0], "file": FILE}
    exec(compile(block.text, "faq.md", "exec"), names)
    again = hf_longctx.AutoModelForCausalLM.from_pretrained(tmp_path / "my-model").eval()
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(answer(again), answer(tiny[1]))
    for model in (again, names["model"].eval()):
        patch_model(model, config_for(model))
        assert torch.equal(answer(model), answer(other))
        model.save_pretrained(tmp_path / "patched")  # in this order as well
    assert "gguf" not in (tmp_path / "patched" / "config.json").read_text()
