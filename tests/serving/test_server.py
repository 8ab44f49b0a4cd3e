"""The server, asked by the real openai client: answers, what is reused, several at once, errors, and its two pages."""

from __future__ import annotations

import json
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from helpers.serving import chatty_toy, running, until
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longctx import patch_model
from hf_longctx.errors import UnsupportedModeError
from hf_longctx.serving.models import ServeSettings

LONG = {"extra_body": {"generation_config": json.dumps({"min_new_tokens": 9, "do_sample": False})}}
WORDS = ("amber", "basil", "cedar", "falcon", "ruby", "ask", "note", "is")


def document(seed: int, words: int = 300) -> str:
    picked = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[i] for i in picked)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(ServeSettings(chatty_toy(tmp_path_factory.mktemp("model")), chunk_size=64)) as one:
        yield one


@pytest.fixture(scope="module")
def own(server):
    """The same model outside of the server, and its tokenizer."""
    model = patch_model(AutoModelForCausalLM.from_pretrained(server.model).eval())
    return model, AutoTokenizer.from_pretrained(server.model)


def said(own, text: str, tokens: int = 4, **more) -> str:
    """What plain generate() says."""
    model, tokenizer = own
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=tokens, **{"do_sample": False, **more})
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.quick
def test_a_completion_is_that_of_generate_and_a_second_turn_reads_what_is_new(server, own):
    text = document(1)
    before = server.count()
    first = server.complete(text, tokens=6)
    assert first == said(own, text, 6)
    more = f"{text} {first} ask amber"
    assert server.complete(more) == said(own, more)
    assert server.complete(f"{text} ask basil") == said(own, f"{text} ask basil"), "and a second user of the document"
    after = server.count()
    assert after["read"] - before["read"] < 300 + 20
    assert after["reused"] - before["reused"] > 590
    assert first != server.complete(document(2), tokens=6), "a control"


def test_chat_streams_what_it_says_at_once(server, own):
    text = document(3, 100)
    whole = server.chat(text, tokens=3)
    assert whole.choices[0].message.content == said(own, f"note {text} ask", 3)
    assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (3, "length")
    pieces = [piece.choices[0].delta.content or "" for piece in server.chat(text, tokens=3, stream=True)]
    assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 3
    before = server.count()
    again = server.chat(text, whole.choices[0].message.content, "ruby", tokens=5)
    assert again.usage.prompt_tokens > 105
    after = server.count()
    assert after["read"] - before["read"] < 20 and after["reused"] - before["reused"] > 90


def test_responses(server, own):
    text = document(4, 50)
    asked = {"model": server.model, "input": text, "max_output_tokens": 5, "temperature": 0, "stream": False}
    want = said(own, f"note {text} ask", 5)
    assert server.client.responses.create(**asked).output_text == want
    events = list(server.client.responses.create(**{**asked, "stream": True}))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == want
    assert events[-1].type == "response.completed"


def test_several_at_once_and_several_documents(server, own):
    texts = [f"{document(seed, 150)} ask {word}" for seed in (5, 6, 7) for word in WORDS[:3]]
    want = [said(own, text) for text in texts]
    with ThreadPoolExecutor(6) as pool:
        whole = pool.map(server.complete, texts)
        streams = pool.map(lambda text: "".join(one.choices[0].text for one in server.stream(text)), texts)
        assert list(whole) == want == list(streams)
    assert len(set(want)) > 2


def test_sampling_has_the_seed_of_its_request(server, own):
    text = document(8, 40)
    how = {"temperature": 9.0, "extra_body": {"generation_config": json.dumps({"do_sample": True})}}
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda seed: server.complete(text, tokens=12, seed=seed, **how), (1, 2, 3, 1)))
    for seed, one in zip((1, 2, 3, 1), got, strict=True):
        torch.manual_seed(seed)
        assert one == said(own, text, 12, do_sample=True, temperature=9.0)
    assert len(set(got)) == 3


def test_a_request_has_its_own_generation_config(server, own):
    text = document(9, 60)
    before = server.count()
    for config in ({"num_beams": 3}, {"repetition_penalty": 1.4}, {"prompt_lookup_num_tokens": 3}, {"min_length": 70}):
        asked = json.dumps({"max_new_tokens": 6, "do_sample": False, **config})
        want = said(own, text, 6, **config)
        assert server.complete(text, tokens=6, extra_body={"generation_config": asked}) == want
    after = server.count()
    assert (after["plain"] - before["plain"], after["kept"] - before["kept"]) == (2, 2)


SAID = "cache_implementation='static' is a fixed-size cache that a patched model cannot read."


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_says_our_sentence(server, stream):
    given = {"model": server.model, "prompt": document(10, 20), "stream": stream}
    before = server.count()
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.completions.create(
            **given, extra_body={"generation_config": json.dumps({"cache_implementation": "static"})}
        )
    assert refused.value.body["message"].startswith(SAID)
    assert refused.value.body["type"] == "invalid_request_error"
    assert server.count()["refused"] - before["refused"] == 1
    with pytest.raises(openai.BadRequestError, match="ValueError: .*strictly positive"):
        server.client.completions.create(
            **given, temperature=-1.0, extra_body={"generation_config": '{"do_sample": true}'}
        )
    with pytest.raises(openai.BadRequestError, match="pinned to .*requested 'another'"):
        server.client.completions.create(**{**given, "model": "another"})
    with pytest.raises(openai.APIStatusError, match="Unexpected fields"):
        server.client.completions.create(**given, extra_body={"made_up": 1})
    assert server.complete(document(10, 20))


def test_another_error_is_the_servers(server, monkeypatch):
    def broken(*args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr(server.models.kept, "original", broken)
    before = server.count()
    with pytest.raises(openai.InternalServerError, match="MemoryError: no room"):
        server.complete(document(11, 20))
    with pytest.raises(openai.InternalServerError, match="MemoryError: no room"):
        list(server.stream(document(11, 21)))
    assert server.count()["failed"] - before["failed"] == 2


def test_an_error_in_the_middle_of_a_stream_is_one_that_clients_read(server, own, monkeypatch):
    forward, calls = server.models.model.forward, []

    def breaks(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise UnsupportedModeError('it says "no"')
        return forward(*args, **kwargs)

    monkeypatch.setattr(server.models.model, "forward", breaks)
    pieces = []
    with pytest.raises(openai.APIError, match='it says "no"'):
        for piece in server.stream(document(12, 20), tokens=9, **LONG):
            pieces.append(piece)
    assert pieces
    monkeypatch.undo()
    assert server.complete(document(12, 20)) == said(own, document(12, 20))


# The pages


def test_the_pages_say_what_was_done(server):
    server.complete(document(13, 40))
    now = server.status()
    assert now["report"]["retrieval_heads"] == 4 and now["report"]["kv_heads"] == 16
    assert now["model"] == server.model
    assert 0 < now["prompts"]["bytes"] <= now["prompts"]["limit"] == 4 * 10**9
    for text in (server.page("/longctx", Accept="text/plain"), server.page("/longctx?format=text")):
        assert "KV heads      4 of 16 keep every token" in text
        assert f"tokens        {now['tokens']['read']} read" in text
        assert max(map(len, text.replace(server.model, "").splitlines())) <= 80
    metrics = {
        (one.name, *one.labels.values()): one.value
        for family in text_string_to_metric_families(server.page("/metrics"))
        for one in family.samples
    }
    assert metrics["hf_longctx_tokens_total", "reused"] == now["tokens"]["reused"]
    assert metrics["hf_longctx_requests_total", "answered"] == now["requests"]["answered"]
    assert metrics["hf_longctx_prompt_bytes",] == now["prompts"]["bytes"]
    assert metrics["process_resident_memory_bytes",] > 0


def test_a_reset_frees_the_prompts_and_the_next_request_loads_the_model(server):
    want = server.complete(document(14, 30))
    with pytest.raises(urllib.error.HTTPError):
        server.page("/reset")
    server.client.post("../reset", cast_to=object)
    assert server.status() is None and server.page("/longctx?format=text") == "no model is loaded\n"
    assert "hf_longctx_kv_heads" not in server.page("/metrics")
    assert server.complete(document(14, 30)) == want
    until(lambda: server.count()["answered"] == 1)
    with pytest.raises(openai.BadRequestError, match="alone, asked for 'another'"):
        server.client.post("../load_model", cast_to=object, body={"model": "another"})
