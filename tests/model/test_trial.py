"""A model type without a record: the error says what a tiny random copy of it shows, and nothing else has changed."""

from __future__ import annotations

import dataclasses
import random
import textwrap
from types import SimpleNamespace

import pytest
import torch
from helpers.every_family import CASES, tiny_config
from helpers.registered import nothing_kept
from helpers.tiny import config_for
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.masking_utils import AttentionMaskInterface

import hf_longctx.model.family
from hf_longctx import Family, UnsupportedModelError, patch_model, unpatch_model
from hf_longctx.config.words import registered
from hf_longctx.model.family import families, find_family
from hf_longctx.model.modules import language_model, state_of
from hf_longctx.model.patch import _apply
from hf_longctx.model.spy import NAME, Call, candidate
from hf_longctx.model.tiny import tiny_copy
from hf_longctx.model.trial import refusal, written

HAVE = families()
IDS = torch.arange(5, 45)[None]
RECORDS = {
    "llama": Family("llama"),
    "qwen2": Family("qwen2", sliding="layer_types"),
    "qwen3": Family("qwen3", sliding="layer_types"),
    "mistral": Family("mistral", sliding="all"),
    "mixtral": Family("mixtral"),
    "gemma2": Family("gemma2", sliding="layer_types", scores={"softcap": "softcap"}),
    "gpt_oss": Family("gpt_oss", sliding="layer_types", scores={"s_aux": "sinks"}),
    "phi3": Family("phi3", key_projection="qkv_proj"),
    "qwen3_next": Family("qwen3_next", sliding="layer_types"),
    "llama4_text": Family("llama4_text", sliding="layer_types"),
    "gpt2": Family("gpt2", layers="h", attention="attn", key_projection="c_attn"),
}
ALIKE = set(RECORDS) & set(HAVE) - {"mixtral", "phi3"}  # these two say what a config without a window does not show
REASONS = {
    "deepseek_v3": "multi-head latent attention .kv_lora_rank.*no KV head to give a role",
    "bart": "it is an encoder-decoder",
    "mamba": "none of its layers is attention",
    "bloom": "its attention .BloomAttention. is computed in its own code",
    "bert": "its attention is at 'encoder.layer.0.attention.self' of the BertModel",
    "inkling_text": "asks its attention function for position_bias, which",
    "doge": "makes attention masks of its own",
    "gemma4_text": "different numbers or sizes of KV heads",
    "gemma3n_text": r"its layers \[4, 5\] cache no keys and values",
    "diffllama": r"its layers \[0, 1\] hand other keys and values",
    "gpt_neox": "the forward of its GPTNeoXAttention takes no '",
    "falcon_h1": r"its layers \[0, 1\] keep states of linear attention beside keys",
    "nemotron_h": "keep something else .NemotronHMLP, NemotronHMoE. where others keep their attention",
}


def of_type(model_type: str, auto=AutoModel):
    """A model of this type; without numbers, which a trial must not ask for."""
    with torch.device("meta"):
        return auto.from_config(tiny_copy(CONFIG_MAPPING[model_type]()))


def said(model_type: str, patch=_apply) -> str:
    return str(refusal(language_model(of_type(model_type)), patch))


@pytest.fixture
def unknown(monkeypatch):
    """Drops the record of a model type."""

    def drop(model_type: str) -> None:
        others = [one for one in HAVE if one != model_type]
        monkeypatch.setattr(hf_longctx.model.family, "families", lambda: others)

    return drop


@pytest.mark.parametrize("model_type", RECORDS)
def test_a_type_that_would_work_is_told_its_record(model_type):
    text = said(model_type)
    assert text.startswith(f"model_type '{model_type}' is not supported yet, but most likely works:")
    assert "left-padded (largest difference" in text
    assert f"\n    register('family', '{model_type}', {written(RECORDS[model_type])})\n" in text
    assert f"in a file hf_longctx/patches/{model_type}.py:" in text
    assert text.endswith("compare it with the dense model: hf_longctx.compare(model, prompt).")
    if model_type in ALIKE:
        assert dataclasses.replace(find_family(model_type), multimodal=()) == RECORDS[model_type]


def test_a_record_is_written_as_the_call_that_makes_it():
    for record in RECORDS.values():
        assert eval(written(record)) == record


@pytest.mark.parametrize("model_type", REASONS)
def test_a_type_that_would_not_is_told_why(model_type):
    text = said(model_type)
    assert text.startswith(f"model_type '{model_type}' cannot be patched: ")
    with pytest.raises(UnsupportedModelError, match=REASONS[model_type]):
        raise UnsupportedModelError(text)
    assert text.endswith("Run it without patch_model; `hf-longctx configs models` lists the types that work.")
    assert "register(" not in text
    assert len(text) < 420


def test_what_the_message_says_works():
    """Its lines are run as they stand; then a model is patched by the record, and gives what it gave before."""
    model_type = next(one for one in ("nemotron", "stablelm", "gptj") if one not in HAVE)
    torch.manual_seed(0)
    config = tiny_copy(CONFIG_MAPPING[model_type](), initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    want = model(IDS).logits
    with pytest.raises(UnsupportedModelError) as caught:
        patch_model(model)
    lines = str(caught.value).split("before patch_model:\n\n")[1].split("\n\nor in a file")[0]
    with nothing_kept():
        exec(textwrap.dedent(lines))
        patch_model(model, config_for(model, "retrieval"))
        assert (model(IDS).logits - want).abs().max() < 1e-5
        unpatch_model(model)


@pytest.mark.parametrize("model_type", ["qwen3", "bloom", "deepseek_v3"])
def test_nothing_else_has_changed(model_type, unknown):
    unknown(model_type)
    model = AutoModelForCausalLM.from_config(tiny_copy(CONFIG_MAPPING[model_type]())).eval()
    config, words = model.config.to_dict(), {folder: dict(one) for folder, one in registered.items()}
    weights = {name: one.clone() for name, one in model.state_dict().items()}
    own = {module: dict(vars(module)) for module in model.modules()}
    numbers = torch.get_rng_state(), random.getstate()
    with pytest.raises(UnsupportedModelError, match=f"model_type '{model_type}'"):
        patch_model(model)
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert random.getstate() == numbers[1]
    assert registered == words
    for interface in (AttentionInterface, AttentionMaskInterface):
        assert NAME not in interface().valid_keys()
    assert state_of(model) is None
    assert model.config.to_dict() == config
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items())
    assert all(vars(module).keys() == own[module].keys() for module in model.modules())


def test_no_number_of_the_model_is_read(unknown):
    unknown("qwen3")
    with pytest.raises(UnsupportedModelError, match="most likely works"):
        patch_model(of_type("qwen3", AutoModelForCausalLM))


def test_a_multimodal_model_is_tried_by_its_language_model():
    """No image is asked for, and the vision model is not built."""
    text = str(refusal(language_model(of_type("gemma3", AutoModelForImageTextToText)), _apply))
    assert "patched as Family('gemma3_text', sliding='layer_types'), gives what its eager attention gives" in text


def test_a_copy_that_is_not_equal_is_no_record():
    def otherwise(model, config, family):
        _apply(model, config, family)
        model.layers[0].self_attn.o_proj.weight.data += 1

    assert "patched as Family('llama'), differs from its eager attention by" in said("llama", otherwise)


def test_a_copy_that_fails_once_patched_is_no_record():
    def fails(model, config, family):
        raise UnsupportedModelError("no.\nMore")

    assert "patched as Family('llama'), does not run: UnsupportedModelError: no. Run it" in said("llama", fails)


def test_a_copy_that_cannot_be_built_leaves_the_plain_message(unknown, monkeypatch):
    unknown("qwen3")
    model = of_type("qwen3", AutoModelForCausalLM)
    monkeypatch.setattr(type(model.model), "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(UnsupportedModelError) as caught:
        patch_model(model)
    text = str(caught.value)
    assert text.startswith("model_type 'qwen3' cannot be patched: no record in patches/ is for it. A tiny copy")
    assert (
        "A tiny copy of it could not be tried: ZeroDivisionError: division by zero. `hf-longctx configs models` lists"
        in text
    )
    assert "FAMILY = Family(model_type='qwen3')" in text


def test_without_a_model_the_plain_message_says_who_tries_it(unknown):
    unknown("qwen3")
    with pytest.raises(
        UnsupportedModelError, match=r"patch_model\(model\) tries one on a tiny copy of the model\. `hf"
    ):
        find_family("qwen3")


def test_an_attention_without_a_projection_of_keys_is_told_what_it_has():
    model, calls = seen_in("olmo2", (None, None))
    attention = model.layers[0].self_attn
    attention.keys = attention._modules.pop("k_proj")
    attention.keys.out_features = 5
    found = candidate(calls, model)
    assert "its Olmo2Attention has no projection that makes the keys; it has q_proj, v_proj" in found


def test_a_model_that_differs_in_chunks_by_itself_is_not_blamed():
    """Moshi's chunks differ from one forward in Transformers; those of a patched copy do not."""
    assert "most likely works" in said("moshi")


@pytest.mark.parametrize(("windows", "word"), [((9, None), "layer_types"), ((9, 9), "all"), ((None, None), "none")])
def test_windows_are_said_by_the_word_that_gives_them(windows, word):
    model, calls = seen_in("olmo2", windows)
    config = model.config
    config.sliding_window = 9
    config.layer_types = None if word == "all" else ["sliding_attention", "full_attention"]
    assert candidate(calls, model).sliding == word


def test_a_window_that_no_word_gives_is_named():
    model, calls = seen_in("olmo2", (8, None))
    model.config.sliding_window = 9
    assert "see windows (layer: tokens, 0: 8, 1: None) that neither" in candidate(calls, model)


def seen_in(model_type: str, windows):
    """A model, and what a spy would have seen of it if its layers had these windows."""
    model = of_type(model_type)
    calls = [
        Call(f"layers.{layer}.self_attn", layer, window, frozenset(), True, False, 4, (2, 16))
        for layer, window in enumerate(windows)
    ]
    return model, SimpleNamespace(calls=calls, returned={0: (), 1: ()}, cache=SimpleNamespace(layers=[None, None]))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_record_there_is_would_be_found(case):
    """Without a window a config does not show that the type can have one."""
    with torch.device("meta"):
        model = AutoModel.from_config(tiny_config(case).get_text_config())
    text = str(refusal(language_model(model), _apply))
    record = dataclasses.replace(find_family(case.model_type), multimodal=())
    record = dataclasses.replace(record, sliding="none") if record.sliding == "all" and not case.window else record
    assert f"patched as {written(record)}, gives what its eager attention gives" in text
