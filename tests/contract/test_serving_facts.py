"""What ``hf_longctx/serving`` relies on of Transformers' own server, one small test each; nothing of hf_longctx."""

from __future__ import annotations

import inspect
import json
import threading

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler, GenerateManager, GenerationState, InferenceThread

HANDLERS = (ChatCompletionHandler, CompletionHandler, ResponseHandler)


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.quick
def test_the_parts_are_put_together_so():
    parts = ["model_manager", "chat_handler", "completion_handler", "response_handler", "transcription_handler"]
    assert parameters(build_server)[:7] == [*parts, "systemone_handler", "generation_state"]
    for handler in HANDLERS:
        assert parameters(handler)[:2] == ["model_manager", "generation_state"]


def test_a_manager_names_and_loads_its_model_by_methods_of_its_own():
    assert {"device", "dtype", "continuous_batching", "force_model"} <= set(parameters(ModelManager))
    assert "continuous_batching" in parameters(GenerationState)
    source = inspect.getsource(ModelManager.__init__)
    assert "self.load_model_and_processor(self.process_model_name(repo)" in source
    assert "self.loaded_models" in source
    assert "self.model_manager.load_model_and_processor(" in inspect.getsource(BaseHandler._resolve_model)


def test_a_manager_of_answers_calls_generate_by_submit_or_async_submit():
    streams = inspect.getsource(GenerateManager.generate_streaming)
    assert "model.generate(**gen_kwargs)" in streams and "self.submit(_run)" in streams
    assert "self.async_submit(model.generate" in inspect.getsource(GenerateManager.generate_non_streaming)
    assert parameters(GenerationState.get_manager) == ["self", "model_id", "use_cb"]
    for handler in HANDLERS:
        assert "self.generation_state.get_manager(" in inspect.getsource(handler.handle_request)


def test_a_model_has_one_thread():
    thread = InferenceThread()
    names = {thread.submit(threading.get_ident).result() for _ in range(3)}
    assert len(names) == 1 and threading.get_ident() not in names


@pytest.mark.parametrize("handler", HANDLERS)
def test_every_handler_makes_its_generation_config_by_one_method(handler):
    def seen(self, body, *args, **kwargs):
        raise KeyError(body["seed"])

    base = type("Base", (handler,), {"_build_generation_config": seen})(None, GenerationState())
    with pytest.raises(KeyError):
        base._build_generation_config({"seed": 3}, GenerationConfig())
    asked = "self._build_generation_config(body, model.generation_config, use_cb=use_cb)"
    assert asked in inspect.getsource(handler.handle_request)
    config = handler(None, GenerationState())._build_generation_config({}, GenerationConfig(max_new_tokens=3))
    assert config.max_new_tokens == 1024
    text = json.dumps({"max_new_tokens": 3})
    asked = handler(None, GenerationState())._build_generation_config({"generation_config": text}, GenerationConfig())
    assert asked.max_new_tokens == 3


@pytest.mark.parametrize("handler", [ChatCompletionHandler, CompletionHandler])
def test_an_error_in_a_stream_is_written_as_it_is(handler):
    assert """f'data: {{"error": "{""" in inspect.getsource(handler._streaming)


class Ends(StoppingCriteria):
    def __init__(self, log: list):
        self.log = log

    def __call__(self, input_ids, scores, **kwargs):
        self.log.append("asked")
        return torch.full((len(input_ids),), self.log.count("asked") == 3, dtype=torch.bool)


class Streamer:
    def __init__(self, log: list):
        self.log = log

    def put(self, value):
        self.log.append(f"put {value.numel()}")

    def end(self):
        self.log.append("end")


def test_a_criterion_is_asked_after_every_token_and_ends_an_answer_in_order():
    small = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "eos_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **small, **heads)).eval()
    model.generation_config.eos_token_id, log = None, []
    given = {"streamer": Streamer(log), "stopping_criteria": StoppingCriteriaList([Ends(log)])}
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9, do_sample=False, pad_token_id=0, **given)
    assert out.shape == (1, 6)
    assert log[0] == "put 3" and log[-1] == "end", "the first put is the prompt"
    assert log.count("asked") == log.count("put 1") == 3
