"""The server with --continuous-batching: answers, streams, a client that leaves, and what one request cannot ask."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from helpers.serving import running
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longctx import patch_model
from hf_longctx.assets import embedded
from hf_longctx.serving.models import ServeSettings

WORDS = ("amber", "basil", "cedar", "falcon", "ruby")


@pytest.fixture(scope="module")
def server():
    settings = ServeSettings("hf-longctx/tiny-llama", prompt_cache=0, continuous_batching=True)
    with running(settings) as one:
        yield one


def prompts() -> list[str]:
    picked = torch.randint(5, (4, 90), generator=torch.Generator().manual_seed(1)).tolist()
    return [" ".join(WORDS[i] for i in line) for line in picked]


def test_requests_that_run_together_are_answered_as_alone(server):
    folder = embedded("hf-longctx/tiny-llama")
    model = patch_model(AutoModelForCausalLM.from_pretrained(folder).eval())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    want = []
    for text in prompts():
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=4, do_sample=False)
        want.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(server.complete, prompts())) == want
        streams = pool.map(lambda text: "".join(one.choices[0].text for one in server.stream(text)), prompts())
        assert list(streams) == want
    assert len(set(want)) > 2
    assert server.status()["prompts"]["stored"] == 0
    assert server.status()["report"]["forwards"] > 0
    assert "KV heads      4 of 16" in server.page("/longctx?format=text")


def test_a_client_that_leaves_does_not_stop_the_others(server):
    stream = server.stream(prompts()[0], tokens=500)
    next(stream)
    stream.close()
    assert server.complete(prompts()[1]) and json.loads(server.page("/health")) == {"status": "ok"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"seed": 3}, "seed=3: with --continuous-batching all requests share"),
        ({"extra_body": {"generation_config": '{"do_sample": true}'}, "temperature": 0.7}, "do_sample=True, "),
        ({"extra_body": {"generation_config": '{"repetition_penalty": 1.3}'}}, "repetition_penalty=1.3: "),
        ({"extra_body": {"generation_config": '{"num_beams": 3}'}}, "num_beams=3: "),
    ],
)
def test_what_all_requests_share_cannot_be_asked_by_one(server, more, said):
    with pytest.raises(openai.BadRequestError) as refused:
        server.complete(prompts()[2], **more)
    assert said in refused.value.body["message"]
    assert server.complete(prompts()[2])
