"""``bench serve``: a load on a server of the toy; and the slow one, on SmolLM2-135M-Instruct."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.serving import running
from rich.console import Console
from typer.testing import CliRunner

from hf_longctx.assets import BOOK
from hf_longctx.bench.serve import LoadSettings, run
from hf_longctx.commands._app import app
from hf_longctx.commands._bench_serve import show
from hf_longctx.errors import ConfigError
from hf_longctx.serving.kept import KeptGenerate
from hf_longctx.serving.models import ServeSettings

REAL = "hf-longctx/smollm2-135m-instruct"


def toy_text(path: Path) -> Path:
    words = ("amber", "basil", "cedar", "falcon", "ruby", "is", "note", "ask")
    picked = torch.randint(len(words), (600,), generator=torch.Generator().manual_seed(1)).tolist()
    path.write_text(" ".join(words[i] for i in picked))
    return path


@pytest.fixture(scope="module")
def server():
    with running(ServeSettings("hf-longctx/tiny-llama", prompt_cache=3_000_000, chunk_size=64)) as one:
        yield one


def test_the_command_says_whether_the_answers_are_those_of_one_alone(server, tmp_path, monkeypatch):
    out = tmp_path / "load.json"
    words = ["bench", "serve", "--url", server.url, "--text", toy_text(tmp_path / "text"), "--words", "90"]
    words += ["--clients", "4", "--questions", "2", "--max-new-tokens", "4", "--seconds", "1", "--json", out]
    done = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    data = json.loads(out.read_text())
    assert data["answers"] > 4 and data["other"] == 0
    assert 0 < data["bytes"] <= 3_000_000
    assert f"answers       {data['answers']} (" in done.stdout and "all as alone" in done.stdout
    assert "p95" in done.stdout and "open files" in done.stdout


def test_another_answer_is_counted(server, tmp_path, monkeypatch):
    plain, asked = KeptGenerate.__call__, []

    def wrong(self, input_ids=None, **kwargs):
        asked.append(1)
        out = plain(self, input_ids, **kwargs)
        ruby = torch.tensor(self.tokenizer("ruby")["input_ids"])[None]
        return out if len(asked) < 8 else torch.cat([out, ruby], 1)

    monkeypatch.setattr(KeptGenerate, "__call__", wrong)
    found = run(LoadSettings(server.url, 2, 3, 2, 90, 4, 1, toy_text(tmp_path / "text")))
    assert found["other"] > 0


def test_what_cannot_be_asked_is_said(server, tmp_path):
    with pytest.raises(ConfigError, match="no server answers at http://localhost:9: "):
        run(LoadSettings("http://localhost:9"))
    (tmp_path / "few").write_text("too few words")
    with pytest.raises(ConfigError, match="3 words are too few for 3 documents of 600"):
        run(LoadSettings(server.url, text=tmp_path / "few"))
    with pytest.raises(ConfigError, match="text: .* cannot be read"):
        run(LoadSettings(server.url, text=tmp_path / "none"))
    with pytest.raises(ConfigError, match="clients must be at least 1"):
        LoadSettings(clients=0)


@pytest.fixture(scope="module")
def real():
    with running(ServeSettings(REAL, prompt_cache=300_000_000, chunk_size=512, dtype="float32")) as one:
        yield one


@pytest.mark.slow
def test_a_real_model_answers_stops_and_goes_on(real):
    book = " ".join(BOOK.read_text("utf-8").split()[:500])
    asked = f"{book}\n\nWho is mentioned first? Answer in one sentence."
    first = real.chat(asked, tokens=24).choices[0].message.content
    before = real.count()
    more = real.chat(asked, first, "And who comes next?", tokens=12)
    assert more.choices[0].message.content
    after = real.count()
    assert after["read"] - before["read"] < 60 and after["reused"] - before["reused"] > 600
    pieces = real.chat(asked, tokens=24, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == first
    assert real.chat("Count: one, two, three,", tokens=24, stop=["five"]).choices[0].message.content.count("five") <= 1
    answer = real.client.responses.create(model=REAL, input="Say hello.", max_output_tokens=8, stream=False)
    assert answer.output_text


@pytest.mark.slow
def test_a_minute_of_load_on_a_real_model(real, capsys):
    """`hf-longctx bench serve` runs five of them, and docs/serving.md has what came of it."""
    found = run(LoadSettings(real.url, seconds=60, words=150, tokens=8))
    with capsys.disabled():
        show(Console(width=80), found)
    assert found["answers"] > 8 and found["other"] == 0
    assert found["bytes"] <= 300_000_000
    assert found["resident"]["last"] - found["resident"]["first"] < 300_000_000
    assert found["handles"]["last"] - found["handles"]["first"] <= 16
    kept = real.models.kept
    assert not kept.prompts._reading and kept.outcomes["failed"] == 0
