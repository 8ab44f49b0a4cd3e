"""A client that hangs up: while its prompt is read, while it waits, in a stream; what was read stays, all goes on."""

from __future__ import annotations

import gc
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from helpers.serving import running, until

from hf_longctx.serving.models import ServeSettings

CHUNK = 32
LONG = {"extra_body": {"generation_config": json.dumps({"min_new_tokens": 200, "do_sample": False})}}


@pytest.fixture(scope="module")
def server():
    with running(ServeSettings("hf-longctx/tiny-llama", chunk_size=CHUNK)) as one:
        one.complete(prompt(0))  # the first request waits for what is loaded late
        yield one


class Gate:
    """Stops the model before its forward number ``at``, until it is opened."""

    def __init__(self, model, at: int):
        self.forward, self.at, self.calls = model.forward, at, 0
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            self.reached.set()
            assert self.opened.wait(30)
        return self.forward(*args, **kwargs)


@pytest.fixture
def gate(server, monkeypatch):
    def at(number: int) -> Gate:
        one = Gate(server.models.model, number)
        monkeypatch.setattr(server.models.model, "forward", one)
        return one

    server.models.kept.prompts.clear()
    yield at
    monkeypatch.undo()


def prompt(seed: int, words: int = 320) -> str:
    names = ("amber", "basil", "cedar", "falcon", "ruby")
    return " ".join(
        names[i] for i in torch.randint(5, (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    )


def impatient(server) -> openai.OpenAI:
    """A client that closes its connection after a moment."""
    return server.client.with_options(timeout=0.5)


@pytest.mark.parametrize("stream", [False, True])
def test_while_its_prompt_is_read(server, gate, stream):
    one, before = gate(4), server.count()
    text = prompt(1 + stream)
    with pytest.raises(openai.APITimeoutError):
        list(impatient(server).completions.create(model=server.model, prompt=text, stream=stream))
    assert one.reached.wait(10)
    one.opened.set()
    until(lambda: server.count()["stopped"] > before["stopped"])
    assert one.calls in (4, 5), "no more pieces are read"
    read = server.count()["read"] - before["read"]
    assert read in (4 * CHUNK, 5 * CHUNK)
    assert server.status()["prompts"]["stored"] == 1
    server.complete(text)
    after = server.count()
    assert after["read"] - before["read"] == 319 and after["reused"] - before["reused"] == read, "the next one goes on"


def test_while_it_waits_for_another(server, gate):
    one, before = gate(2), server.count()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.complete, prompt(3))
        assert one.reached.wait(10)
        with pytest.raises(openai.APITimeoutError):
            impatient(server).completions.create(model=server.model, prompt=prompt(4))
        one.opened.set()
        first.result(30)
    until(lambda: server.count()["stopped"] > before["stopped"])
    assert server.count()["read"] - before["read"] == 319, "of the second nothing was read"


def test_in_a_stream_what_was_said_is_kept_as_well(server, gate):
    before = server.count()
    text = prompt(5, 40)
    stream = server.stream(text, tokens=200, **LONG)
    said = [next(stream).choices[0].text for _ in range(3)]
    stream.close()
    until(lambda: server.count()["stopped"] > before["stopped"])
    stored = server.models.kept.prompts._table.values()
    kept = max(stored, key=len)
    assert 40 + 3 <= len(kept) < 40 + 200
    tokenizer = server.models.kept.tokenizer
    whole = tokenizer.decode(kept.ids, skip_special_tokens=True)
    assert whole.startswith(f"{text} {''.join(said).strip()}")
    now = server.count()
    server.complete(f"{whole} ruby")
    assert server.count()["read"] - now["read"] <= 2, "a turn after the unfinished answer reads what is new"


def test_nothing_is_left_of_those_who_left(server, gate):
    prompts = server.models.kept.prompts
    text = prompt(6, 40)
    want = server.complete(text, tokens=8)
    for _ in range(5):
        stream = server.stream(text, tokens=200, **LONG)
        next(stream)
        stream.close()
    before = server.count()
    assert server.complete(text, tokens=8) == want
    until(lambda: server.count()["answered"] > before["answered"])
    assert not prompts._reading
    assert len(prompts) <= 3, "of several answers that begin alike the longest one stays"
    gc.collect()
    caches = [one for one in gc.get_objects() if type(one).__name__ == "LongCtxCache"]
    assert len(caches) == len(prompts)
    assert threading.active_count() < 20
