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
KEPT = "4GB"
CHUNK = 2048
BATCHING = (
    "with --continuous-batching: it answers requests together, reads each prompt itself as far as a step has room, and "
    "keeps none. Give one of the two."
)

Longctx = Annotated[str, typer.Option(help="What to patch with: auto, a shipped name, a .yaml, or a Hub repository.")]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0: any that is free.", min=0, max=65535)]
Kept = Annotated[
    str | None,
    typer.Option("--prompt-cache", help="Memory for prompts kept between requests; 0GB: none.", show_default=KEPT),
]
Chunk = Annotated[
    int | None,
    typer.Option(
        "--prefill-chunk-size", help="Tokens of a prompt per forward. Or --chunk.", min=1, show_default=str(CHUNK)
    ),
]
Compile = Annotated[bool, typer.Option("--compile", help="Of transformers serve; refused.")]
Batching = Annotated[
    bool, typer.Option("--continuous-batching", help="Answer requests together; no prompt is kept between them.")
]


def command(
    model: Model,
    longctx: Longctx = "auto",
    host: Host = "localhost",
    port: Port = 8000,
    prompt_cache: Kept = None,
    chunk: Chunk = None,
    dtype: Dtype = "auto",
    device: Device = None,
    compile: Compile = False,
    continuous_batching: Batching = False,
) -> None:
    """Serve a patched model to OpenAI's clients; what was read of a prompt is kept for the next that begins alike."""
    if compile:
        raise UnsupportedModeError(COMPILE)
    for name, value in (("--prompt-cache", prompt_cache), ("--prefill-chunk-size", chunk)):
        if continuous_batching and value is not None:
            raise ConfigError(f"{name} {BATCHING}")
    check_word(dtype, DTYPES, "--dtype")
    limit = 0 if continuous_batching else parse_bytes(prompt_cache or KEPT, "--prompt-cache")
    check_installed()
    from ..serving.models import ServeSettings
    from ..serving.server import serve

    settings = ServeSettings(model, longctx, limit, chunk or CHUNK, dtype, str(device_of(device)), continuous_batching)
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
