"""A server in this process on a free port, and the openai client that talks to it."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import uvicorn
from transformers import AutoTokenizer

from hf_longctx.assets import asset
from hf_longctx.serving.models import PatchedModels, ServeSettings
from hf_longctx.serving.server import Stops, bound, make_app

TEMPLATE = (
    "{% for m in messages %}{{ 'note ' if m['role'] == 'user' else 'is ' }}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}ask{% endif %}"
)


@dataclass(frozen=True)
class Server:
    """One that runs."""

    model: str
    url: str
    client: openai.OpenAI
    models: PatchedModels

    def page(self, path: str, **headers: str) -> str:
        asked = urllib.request.Request(f"{self.url}{path}", headers=headers)
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.read().decode()

    def status(self) -> dict[str, Any]:
        return json.loads(self.page("/longctx"))

    def count(self) -> dict[str, int]:
        """Tokens read and reused, and requests by how they ended, so far."""
        now = self.status()
        return now["tokens"] | now["requests"]

    def complete(self, prompt: str, tokens: int = 4, **more: Any) -> str:
        given = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, **more}
        return self.client.completions.create(**given).choices[0].text

    def stream(self, prompt: str, tokens: int = 4, **more: Any) -> Any:
        return self.client.completions.create(
            model=self.model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True, **more
        )

    def chat(self, *said: str, tokens: int = 4, **more: Any) -> Any:
        """The answer to what user and assistant have said in turn."""
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
        given = {"model": self.model, "messages": messages, "max_tokens": tokens, "temperature": 0, **more}
        return self.client.chat.completions.create(**given)


@contextmanager
def running(settings: ServeSettings) -> Iterator[Server]:
    """Serve until the end of the block."""
    app = make_app(settings)
    taken = bound("127.0.0.1", 0)
    server = Stops(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    until(lambda: server.started)
    url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    try:
        yield Server(settings.model, url, client, app.state.models)
    finally:
        client.close()
        server.should_exit = True
        thread.join(30)
        taken.close()


def until(done: Callable[[], Any], seconds: float = 20) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def chatty_toy(folder: Path) -> str:
    """The folder of the embedded tiny-llama with a chat template, under ``folder``."""
    made = folder / "tiny-llama"
    made.mkdir()
    for path in asset("tiny-llama").iterdir():
        (made / path.name).symlink_to(path)
    tokenizer = AutoTokenizer.from_pretrained(made)
    tokenizer.chat_template = TEMPLATE
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (made / name).unlink()
    tokenizer.save_pretrained(made)
    return str(made)
