"""Options of generate() that come to a prompt in a generation config: as an argument would, or the answer itself."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.generation import word_tokenizer
from helpers.tiny import config_for, tiny_model
from transformers import GenerationConfig

from hf_longctx import ConfigError, PromptCache, UnsupportedModeError, patch_model
from hf_longctx.prompts.prompt import ONE_ROW, OWN, STORED

QUESTIONS = [[5, 6, 7], [8, 9]]
PLACES = ("generation_config", "model.generation_config")


@pytest.fixture
def prompt():
    model = tiny_model()
    patch_model(model, config_for(model))
    return PromptCache(model, word_tokenizer()).prefill(torch.randint(3, 97, (50,)))


def ask(prompt, place: str, **options):
    """Answers to the questions, with the options where ``place`` says."""
    if place == "generation_config":
        config = copy.deepcopy(prompt.model.generation_config)
        config.max_new_tokens = 4
        vars(config).update(options)
        return prompt.ask(QUESTIONS, generation_config=config)
    vars(prompt.model.generation_config).update(options)
    return prompt.ask(QUESTIONS, max_new_tokens=4)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "options",
    [
        {"return_dict_in_generate": True},
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        {"cache_implementation": "dynamic"},
        {"use_cache": True},
        {"token_healing": False},
    ],
    ids=str,
)
def test_the_answer(prompt, place, options):
    want = prompt.ask(QUESTIONS, max_new_tokens=4)
    assert len(want[0]) == 4
    assert ask(prompt, place, **options) == want
    answer, handle = prompt.generate(QUESTIONS[0], max_new_tokens=4, return_handle=True)
    assert answer == want[0]
    assert len(handle) == 57


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "option",
    [
        ("use_cache", False),
        ("cache_implementation", "static"),
        ("cache_implementation", "quantized"),
        ("cache_implementation", "offloaded"),
        ("prefill_chunk_size", 8),
        ("token_healing", True),
    ],
    ids=str,
)
def test_what_an_argument_could_not_do_either(prompt, place, option):
    name, value = option
    with pytest.raises(ConfigError, match=f"^{place}.{name}={value!r}: a prompt brings its own cache"):
        ask(prompt, place, **{name: value})
    with pytest.raises(ConfigError, match="a prompt sets this itself"):
        prompt.ask(QUESTIONS, **{name: value})


def test_the_first_config_counts(prompt):
    want = prompt.ask(QUESTIONS, max_new_tokens=4)
    prompt.model.generation_config.use_cache = False
    assert ask(prompt, "generation_config", use_cache=True) == want


def test_every_option_of_a_prompt_that_a_config_can_hold_was_decided():
    held = {name for name in OWN if hasattr(GenerationConfig(), name)} - {"return_dict_in_generate"}
    assert held | {"prefill_chunk_size"} == set(STORED), "Transformers 5.0 to 5.24 hold these"


@pytest.mark.parametrize("place", PLACES)
def test_rows_are_asked_one_by_one_where_transformers_takes_no_batch(prompt, place):
    assert {"prompt_lookup_num_tokens", "assistant_early_exit"} < set(ONE_ROW)
    with pytest.raises(UnsupportedModeError, match="over a cache that was filled before"):
        ask(prompt, place, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("place", PLACES)
def test_stop_strings_get_the_tokenizer(prompt, place, monkeypatch):
    generate, given = type(prompt.model).generate, []

    def seen(self, ids, **kwargs):
        given.append(kwargs.pop("tokenizer", None))
        prompt.model.generation_config.stop_strings = None
        if config := kwargs.get("generation_config"):
            config.stop_strings = None
        return generate(self, ids, **kwargs)

    monkeypatch.setattr(type(prompt.model), "generate", seen)
    ask(prompt, place, stop_strings=["."])
    assert given == [prompt.tokenizer]
