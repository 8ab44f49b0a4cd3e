"""``bench serve``: many clients at once ask a running server about a few documents, and its answers are compared.

First every question is asked alone; then the clients ask them all at once, at random, for some time. Every tenth hangs
up after the first token. What the server holds is looked at every second.
"""

from __future__ import annotations

import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openai

from ..assets import BOOK
from ..errors import ConfigError
from .measure import Told, quiet

LEAVES = 0.1  # share of the requests whose client hangs up
EVERY = 1.0  # seconds between two looks at the server
GAUGES = {
    "bytes": "hf_longctx_prompt_bytes",
    "stored": "hf_longctx_prompts_stored",
    "resident": "process_resident_memory_bytes",
    "handles": "process_open_fds",
}


@dataclass(frozen=True)
class LoadSettings:
    """How a server is asked.

    Attributes:
        url: of the server, without ``/v1``.
        clients: that ask at once.
        documents: pieces of the text.
        questions: about each of them.
        words: of a document.
        tokens: of an answer.
        seconds: for which they ask.
        text: a file that the documents are cut from; None: a book.
        seed: of what is asked when.
    """

    url: str = "http://localhost:8000"
    clients: int = 8
    documents: int = 3
    questions: int = 4
    words: int = 600
    tokens: int = 16
    seconds: int = 300
    text: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("clients", "documents", "questions", "words", "tokens", "seconds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, given {getattr(self, name)}.")

    @property
    def prompts(self) -> list[str]:
        """Every question after its document.

        Raises:
            ConfigError: the text cannot be read, or is too short.
        """
        try:
            words = Path(self.text or BOOK).read_text("utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"text: {self.text} cannot be read: {error}") from None
        if len(words) < self.documents * self.words:
            raise ConfigError(f"text: {len(words)} words are too few for {self.documents} documents of {self.words}.")
        rng = random.Random(self.seed)
        starts = range(0, self.documents * self.words, self.words)
        documents = [words[start : start + self.words] for start in starts]
        asked = [(one, rng.randrange(len(one) - 4)) for one in documents for _ in range(self.questions)]
        return [" ".join([*one, "\n\nAgain:", *one[at : at + 4]]) for one, at in asked]


@dataclass
class Seen:
    """What the clients saw; their times are in seconds."""

    whole: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    answers: int = 0
    other: int = 0
    left: int = 0
    held: list[dict[str, float]] = field(default_factory=list)


def run(settings: LoadSettings, told: Told = quiet) -> dict[str, Any]:
    """The load, and what came of it.

    Args:
        told: called with 1 every second of the load.

    Raises:
        ConfigError: there is no such server, or the text is too short.
    """
    prompts = settings.prompts
    with openai.OpenAI(base_url=f"{settings.url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        try:
            model = client.models.list().data[0].id
            alone = {prompt: _ask(client, settings, model, prompt) for prompt in prompts}
        except openai.APIConnectionError as error:
            raise ConfigError(f"url: no server answers at {settings.url}: {error}. Start hf-longctx serve.") from None
        seen = Seen(held=[held(settings.url)])
        start = time.perf_counter()
        with ThreadPoolExecutor(settings.clients) as pool:
            end = start + settings.seconds
            asks = [
                pool.submit(_client, client, settings, model, alone, seen, end, number)
                for number in range(settings.clients)
            ]
            _look(settings, seen, asks, told)
            for one in asks:
                one.result()
        took = time.perf_counter() - start
    seen.held.append(held(settings.url))
    return {
        "model": model,
        "settings": {**asdict(settings), "text": str(settings.text or BOOK.name)},
        **_told(seen, took),
    }


def held(url: str) -> dict[str, float]:
    """What the server holds: bytes of prompts, prompts, resident bytes, open files."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=60) as page:
            lines = page.read().decode().splitlines()
    except urllib.error.URLError as error:
        raise ConfigError(f"url: {url}/metrics cannot be read: {error}. It must be a server of hf-longctx.") from None
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(found[gauge]) for name, gauge in GAUGES.items() if gauge in found}


def _ask(client: openai.OpenAI, settings: LoadSettings, model: str, prompt: str) -> str:
    given = {"model": model, "prompt": prompt, "max_tokens": settings.tokens, "temperature": 0}
    return client.completions.create(**given).choices[0].text


def _stream(client: openai.OpenAI, settings: LoadSettings, model: str, prompt: str) -> Iterator[str]:
    given = {"model": model, "prompt": prompt, "max_tokens": settings.tokens, "temperature": 0}
    with client.completions.create(**given, stream=True) as stream:
        for piece in stream:
            yield piece.choices[0].text


def _client(
    client: openai.OpenAI,
    settings: LoadSettings,
    model: str,
    alone: dict[str, str],
    seen: Seen,
    end: float,
    number: int,
) -> None:
    """Ask until the end."""
    rng = random.Random(f"{settings.seed} {number}")
    while (start := time.perf_counter()) < end:
        prompt = rng.choice(list(alone))
        how = rng.random()
        if how < LEAVES:
            stream = _stream(client, settings, model, prompt)
            next(stream)
            stream.close()
            seen.left += 1
            continue
        if how < (1 + LEAVES) / 2:
            answer = _ask(client, settings, model, prompt)
        else:
            stream = _stream(client, settings, model, prompt)
            answer = next(stream)
            seen.first.append(time.perf_counter() - start)
            answer += "".join(stream)
        seen.whole.append(time.perf_counter() - start)
        seen.answers += 1
        seen.other += answer != alone[prompt]


def _look(settings: LoadSettings, seen: Seen, asks: list, told: Told) -> None:
    """Note what the server holds while the clients ask."""
    pause = threading.Event()
    for _ in range(settings.seconds):
        if all(one.done() for one in asks):
            break
        pause.wait(EVERY)
        seen.held.append(held(settings.url))
        told(1)


def _told(seen: Seen, took: float) -> dict[str, Any]:
    """The figures."""
    first, last = seen.held[0], seen.held[-1]
    return {
        "answers": seen.answers,
        "other": seen.other,
        "left": seen.left,
        "seconds": took,
        "whole": _percentiles(seen.whole),
        "first": _percentiles(seen.first),
        "bytes": max(one["bytes"] for one in seen.held),
        "stored": max(one["stored"] for one in seen.held),
        "resident": {"first": first.get("resident"), "last": last.get("resident")},
        "handles": {"first": first.get("handles"), "last": last.get("handles")},
    }


def _percentiles(seconds: list[float]) -> dict[str, float | None]:
    if not seconds:
        return {"p50": None, "p95": None}
    return {"p50": float(np.percentile(seconds, 50)), "p95": float(np.percentile(seconds, 95))}
