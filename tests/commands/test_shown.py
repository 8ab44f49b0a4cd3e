"""What a notebook shows of a result: the printed text, or a short line, never every field."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.tiny import tiny_model
from transformers import AutoTokenizer

from hf_longctx import (
    AutoModelForCausalLM,
    LongCtxConfig,
    PromptCache,
    UnsupportedModelError,
    compare,
    identify,
    patch_model,
    report,
)
from hf_longctx.assets import asset
from hf_longctx.config.config import load_shipped
from hf_longctx.evaluate.run import evaluate
from hf_longctx.evaluate.sentence import sentences


@pytest.fixture(scope="module")
def llama():
    model = AutoModelForCausalLM.from_pretrained(asset("tiny-llama"), longctx=False).eval()
    return model, AutoTokenizer.from_pretrained(asset("tiny-llama"))


@pytest.fixture(scope="module")
def results(llama, tmp_path_factory):
    """Of every kind of result that a person reads."""
    model, tokenizer = llama
    ids = torch.randint(8, 190, (300,), generator=torch.Generator().manual_seed(0))
    asked = {"tasks": "passkey", "lengths": [256], "samples": 1, "depths": [0.5]}
    found = {
        "plan": LongCtxConfig.plan("llama-3.1-8b-instruct", context=4096, memory="24GB"),
        "comparison": compare(model, ids.tolist(), config="auto", max_new_tokens=2, rounds=0),
        "evaluation": evaluate(model, tokenizer, tmp_path_factory.mktemp("out"), config="auto", **asked),
    }
    patch_model(model, "auto")
    model(ids[None])
    return {**found, "report": report(model)}


@pytest.mark.parametrize("kind", ["plan", "comparison", "evaluation", "report"])
def test_a_result_shows_its_printed_text(kind, results):
    result = results[kind]
    assert repr(result) == str(result) and f"{type(result).__name__}(" not in repr(result)
    assert repr([result]) == f"[{result}]"
    assert result == dataclasses.replace(result) and len(dataclasses.fields(result)) > 3
    first = dataclasses.fields(result)[0].name
    assert result != dataclasses.replace(result, **{first: "another"}), "equal by its fields, as before"


def test_an_evaluation_shows_the_sentences_of_its_report(results):
    assert repr(results["evaluation"]).splitlines() == sentences(results["evaluation"])


def test_a_config_says_for_which_model_and_how_many_heads_in_one_line(llama):
    shipped = load_shipped("llama-3.1-8b-instruct")
    assert repr(shipped) == (
        "LongCtxConfig(meta-llama/Llama-3.1-8B-Instruct, 128 of 256 KV heads keep every token "
        "(method: duo_gate, confidence: measured))"
    )
    nameless = {"model": {**shipped.to_dict()["model"], "ids": []}, "heads": {"roles": ["RSSSSSSS"] * 32}}
    assert repr(LongCtxConfig.from_dict(nameless)) == (
        "LongCtxConfig(a llama, 32 of 256 KV heads keep every token (method: given, confidence: none))"
    )
    found = identify(*llama, "echo_induction", tokens=40, sink=4, recent=64)
    assert "(tiny-llama, 8 of 16 KV heads keep every token (method: echo_induction," in repr(found)


def test_prompts_show_what_they_hold_and_how_often_they_served():
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError):
        PromptCache(model)
    described = LongCtxConfig.describe(model.config)
    roles = ["R" + "S" * (described["num_key_value_heads"] - 1)] * described["num_hidden_layers"]
    patch_model(model, {"model": described, "heads": {"roles": roles}})
    cache = PromptCache(model)
    assert repr(cache) == "PromptCache(prompts: 0, 0.00 MB, hits: 0, misses: 0, tokens reused: 0)"
    prompt = cache.prefill(list(range(5, 25)))
    cache.prefill(list(range(5, 25)))
    assert repr(prompt) == f"Prompt(20 tokens, {prompt.nbytes / 1e6:.2f} MB)"
    assert repr(cache) == (
        f"PromptCache(prompts: 1, {cache.nbytes / 1e6:.2f} MB, hits: 1, misses: 1, tokens reused: 19)"
    )
