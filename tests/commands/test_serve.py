"""``hf-longctx serve``: what is refused before the port opens, and the line at the start."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import openai
import pytest
from typer.testing import CliRunner

from hf_longctx.commands import serve as command
from hf_longctx.commands._app import app
from hf_longctx.config.config import load_shipped
from hf_longctx.serving import server

MODEL = "hf-longctx/tiny-llama"


def run(*words: str):
    return CliRunner().invoke(app, ["serve", MODEL, *words], env={"COLUMNS": "300"})


@pytest.fixture(autouse=True)
def nothing_is_served(monkeypatch):
    served = []
    monkeypatch.setattr(server.uvicorn.Server, "run", lambda self, sockets: served.append(sockets[0].getsockname()))
    return served


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compile"], "UnsupportedModeError: --compile: it decodes into a cache of fixed size"),
        (
            ["--continuous-batching", "--prompt-cache", "1GB"],
            "ConfigError: --prompt-cache with --continuous-batching: it answers requests together",
        ),
        (["--continuous-batching", "--chunk", "64"], "ConfigError: --prefill-chunk-size with --continuous-batching"),
        (["--prompt-cache", "much"], "ConfigError: --prompt-cache: 'much' is no size such as 4GB"),
        (["--dtype", "int3"], "ConfigError: --dtype"),
        (["--longctx", "llama-9"], "ConfigError: "),
        (["--host", "no.such.host.invalid"], "ConfigError: --host no.such.host.invalid --port 8000 cannot be served"),
    ],
)
def test_what_is_refused_before_the_port_opens(words, said, nothing_is_served):
    done = run(*words)
    assert done.exit_code == 2 and said.replace("4GB", "24GB") in done.stderr
    assert not nothing_is_served and "Traceback" not in done.output


def test_a_port_that_is_taken_is_known_before_the_model_is_loaded(monkeypatch, nothing_is_served):
    monkeypatch.setattr(server, "make_app", lambda settings: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = run("--host", "127.0.0.1", "--port", str(other.getsockname()[1]))
    assert done.exit_code == 2 and "cannot be served: " in done.stderr and not nothing_is_served


def test_the_line_at_the_start_says_what_is_patched_and_what_it_saves(nothing_is_served):
    done = run("--host", "127.0.0.1", "--port", "0", "--prompt-cache", "200MB")
    assert done.exit_code == 0, done.output
    ((host, port),) = nothing_is_served
    line = done.stdout.strip()
    assert line == (
        f"{MODEL} on http://{host}:{port}/v1, patched: 4 of 16 KV heads keep every token; at 8192 tokens the KV cache "
        "takes 8.6 MB of dense 33.6 MB, 26%; prompts are kept in 200 MB"
    )
    assert "no prompt is kept" in run("--port", "0", "--prompt-cache", "0GB").stdout
    assert "requests are answered together" in run("--port", "0", "--continuous-batching").stdout


def test_a_config_that_does_not_run_in_pages_is_refused_before_the_port_opens(tmp_path, nothing_is_served):
    load_shipped("tiny-llama").override(decode={"retrieval": {"select": "page_bounds", "dense_layers": 0}}).to_yaml(
        tmp_path / "a.yaml"
    )
    done = run("--continuous-batching", "--longctx", str(tmp_path / "a.yaml"))
    assert done.exit_code == 2 and "continuous batching with decode.retrieval" in done.stderr
    assert not nothing_is_served


def test_what_is_not_installed_is_said(monkeypatch):
    found = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    assert "uvicorn is not installed. Run pip install 'hf-longctx[serve]'" in run().stderr
    other = "transformers.cli.serving.systemone"
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == other else found(name))
    assert "this Transformers has another server" in run().stderr


@pytest.mark.slow
def test_a_signal_stops_the_real_command_also_in_the_middle_of_a_stream():
    words = [sys.executable, "-m", "hf_longctx", "serve", MODEL, "--port", "0", "--host", "127.0.0.1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, **pipes, env=dict(os.environ)) as run:
        line = run.stdout.readline()
        assert line.startswith(f"{MODEL} on http://127.0.0.1:"), run.stderr.read()
        url = line.split()[2].rstrip(",")
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            more = {"generation_config": '{"min_new_tokens": 4000, "max_new_tokens": 4000}'}
            stream = client.completions.create(model=MODEL, prompt="amber", stream=True, extra_body=more)
            assert next(iter(stream))
            run.send_signal(signal.SIGINT)
            out, error = run.communicate(timeout=60)
    assert run.returncode == 130 and "200 OK" in out, error
    assert error.rstrip().endswith("Stopped.") and "Traceback" not in error, error
