"""The command ``hf-longctx serve``."""

from __future__ import annotations

import importlib.util
import sys
from typing import Annotated

import typer

from ..config.words import check_word
from ..errors import ConfigError, UnsupportedModeError
from ..io.console import console
from ..planning.sizes import parse_bytes
from ._options import DTYPES, Device, Dtype, Model, device_of, short_names

SETTINGS = short_names(chunk="prefill-chunk-size")
NEEDS = ("fastapi", "uvicorn", "openai", "pydantic", "prometheus_client")
COMPILE = (
    "--compile: it decodes into a cache of fixed size, which a patched model cannot read. Leave it out; "
    "docs/kernels.md says what can be compiled of a patched model."
)
BATCHING = (
    "--continuous-batching: its cache keeps every token of every head, so a patched model refuses it. Leave it out: "
    "requests are answered one after the other, and start from what was read before."
)

Longctx = Annotated[str, typer.Option(help="What to patch with: auto, a shipped name, a .yaml, or a Hub repository.")]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0: any that is free.", min=0, max=65535)]
Kept = Annotated[
    str, typer.Option("--prompt-cache", help="Memory for prompts kept between requests, e.g. 4GB; 0GB: none.")
]
Chunk = Annotated[int, typer.Option("--prefill-chunk-size", help="Tokens of a prompt per forward. Or --chunk.", min=1)]
Compile = Annotated[bool, typer.Option("--compile", help="Of transformers serve; refused.")]
Batching = Annotated[bool, typer.Option("--continuous-batching", help="Of transformers serve; refused.")]


def command(
    model: Model,
    longctx: Longctx = "auto",
    host: Host = "localhost",
    port: Port = 8000,
    prompt_cache: Kept = "4GB",
    chunk: Chunk = 2048,
    dtype: Dtype = "auto",
    device: Device = None,
    compile: Compile = False,
    continuous_batching: Batching = False,
) -> None:
    """Serve a patched model to OpenAI's clients; what was read of a prompt is kept for the next that begins alike."""
    if compile:
        raise UnsupportedModeError(COMPILE)
    if continuous_batching:
        raise UnsupportedModeError(BATCHING)
    check_word(dtype, DTYPES, "--dtype")
    limit = parse_bytes(prompt_cache, "--prompt-cache")
    check_installed()
    from ..serving.models import ServeSettings
    from ..serving.server import serve

    settings = ServeSettings(model, longctx, limit, chunk, dtype, str(device_of(device)), continuous_batching)
    serve(settings, host, port, _say)


def _say(line: str) -> None:
    """At once, also in a pipe: whoever started the server waits for it."""
    console().print(line, markup=False, highlight=False, soft_wrap=True)
    sys.stdout.flush()


def check_installed() -> None:
    """
    Raises:
        ConfigError: what a server needs is not installed.
    """
    lacking = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if lacking:
        raise ConfigError(f"serve: {', '.join(lacking)} is not installed. Run pip install 'hf-longctx[serve]'.")
    if importlib.util.find_spec("transformers.cli.serving.systemone") is None:
        raise ConfigError("serve: this Transformers has another server. Run pip install 'transformers[serving]>=5.24'.")
