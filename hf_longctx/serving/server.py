"""An OpenAI-compatible server of one patched model: Transformers' own, and what it lacks."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler

from ..config.model import made_for
from ..errors import ConfigError
from ..model.batched import check_batching
from ..model.modules import state_of, unwrap
from .http import Listens, say_errors
from .models import Chats, Completions, Generation, PatchedModels, Responses, ServeSettings
from .status import Status, show_status

GRACE = 3  # seconds that answers have when the server is stopped
SHOWN = 8192  # tokens of the line at the start, where the model does not say how many it was made for


def make_app(settings: ServeSettings) -> FastAPI:
    """Load and patch the model, and build the server around it; ``app.state.models`` has it.

    Raises:
        ConfigError: there is no such model, or no config for it.
        UnsupportedModelError: its family cannot be patched.
        UnsupportedModeError: continuous batching is asked for, and the config does not run there.
    """
    models = PatchedModels(settings)
    if settings.continuous_batching:
        check_batching(state_of(models.model).plans, observed=False)
    generation = Generation(settings.continuous_batching)
    both = (models, generation)
    app = build_server(
        models,
        Chats(*both),
        completion_handler=Completions(*both),
        response_handler=Responses(*both),
        transcription_handler=TranscriptionHandler(*both),
        systemone_handler=SystemOneHandler(*both),
        generation_state=generation,
    )

    def status() -> Status | None:
        return None if (kept := models.kept) is None else Status.of(settings, kept)

    show_status(app, status)
    say_errors(app)
    app.state.calls = set()
    app.state.generation = generation
    app.state.models = models
    app.add_middleware(Listens, calls=app.state.calls)
    return app


def bound(host: str, port: int) -> socket.socket:
    """A socket of that address, which does not listen yet.

    Raises:
        ConfigError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port} cannot be served: {error}") from None
    return made


def serve(settings: ServeSettings, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until the process is told to stop.

    Args:
        port: 0: any that is free; the line that is said names it.
        say: gets the line at the start.

    Raises:
        ConfigError: as `bound` and `make_app`.
        UnsupportedModelError, UnsupportedModeError: as `make_app`.
    """
    taken = bound(host, port)
    with taken:
        app = make_app(settings)
        say(start_line(app.state.models, host, taken.getsockname()[1]))
        Stops(uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=GRACE)).run(sockets=[taken])


class Stops(uvicorn.Server):
    """When it is told to stop, ends the answers that are being given at their next token, and the thread of batches."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        state = self.config.app.state
        for call in state.calls:
            call.hang_up()
        await super().shutdown(sockets)
        state.generation.shutdown()


def start_line(models: PatchedModels, host: str, port: int) -> str:
    """What is served, what is patched, and what that saves."""
    model = models.model
    config = state_of(model).config
    tokens = made_for(unwrap(model).config) or SHOWN
    dense, patched = config.kv_bytes(tokens, model.dtype.itemsize)
    saves = f"at {tokens} tokens the KV cache takes {_size(patched)} of dense {_size(dense)}, {patched / dense:.0%}"
    heads = f"{config.retrieval_heads} of {config.kv_heads} KV heads {config.kept}"
    kept = models.settings.prompt_cache
    prompts = f"prompts are kept in {_size(kept)}" if kept else "no prompt is kept"
    if models.settings.continuous_batching:
        prompts = "requests are answered together, by continuous batching"
    return f"{models.settings.model} on http://{host}:{port}/v1, patched: {heads}; {saves}; {prompts}"


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
