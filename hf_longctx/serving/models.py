"""The model of a server, and how its requests reach it: the few private classes of Transformers' serving that are used.

``tests/contract/test_serving_facts.py`` states what is relied on of them.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState

from ..assets import embedded
from ..errors import ConfigError, UnsupportedModeError
from ..model.patch import patch_model
from .call import CALL
from .kept import KeptGenerate

OF_REQUEST = ("max_new_tokens", "max_length", "eos_token_id", "transformers_version")
OF_SAMPLING = ("temperature", "top_p", "top_k")  # which mean nothing where nothing is sampled


@dataclass(frozen=True)
class ServeSettings:
    """What is served.

    Attributes:
        model: hub id, local folder or a name of ours, by which clients ask for it.
        longctx: what ``patch_model`` takes.
        prompt_cache: bytes of all prompts that are kept between requests; 0: none is.
        chunk_size: tokens of a prompt per forward.
        dtype: of the weights; ``auto``: as they are stored.
        device: where the model runs.
        continuous_batching: by the ``init_continuous_batching`` of the patched model, and without kept prompts.
    """

    model: str
    longctx: Any = "auto"
    prompt_cache: int = 4 * 10**9
    chunk_size: int = 2048
    dtype: str = "auto"
    device: str = "cpu"
    continuous_batching: bool = False


class PatchedModels(ModelManager):
    """Loads the one model of the server, patched, with a ``generate`` that keeps prompts.

    Raises:
        ConfigError: there is no such model, or no config for it.
        UnsupportedModelError: its family cannot be patched.
    """

    def __init__(self, settings: ServeSettings):
        self.settings = settings
        self._patching = threading.Lock()
        try:
            super().__init__(
                device=settings.device,
                dtype=settings.dtype,
                continuous_batching=settings.continuous_batching,
                force_model=settings.model,
            )
        except OSError as error:
            raise ConfigError(f"MODEL: {settings.model!r} cannot be loaded: {error}") from None

    def process_model_name(self, model_id: str) -> str:
        """
        Raises:
            ConfigError: another model than the server's.
        """
        if model_id != self.force_model:
            raise ConfigError(f"this server has the model {self.force_model!r} alone, asked for {model_id!r}.")
        return super().process_model_name(embedded(model_id))

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        model, processor = super().load_model_and_processor(*args, **kwargs)
        with self._patching:
            if not isinstance(vars(model).get("generate"), KeptGenerate):
                patch_model(model, self.settings.longctx)
                tokenizer = getattr(processor, "tokenizer", processor)
                settings = {"max_bytes": self.settings.prompt_cache, "chunk_size": self.settings.chunk_size}
                model.generate = KeptGenerate(model, tokenizer, **settings)
        return model, processor

    @property
    def model(self) -> Any:
        """The model; None where it was unloaded (``POST /reset``), until the next request."""
        return next((timed.model for timed in self.loaded_models.values()), None)

    @property
    def kept(self) -> KeptGenerate | None:
        """What keeps the prompts of the model; None where it was unloaded."""
        return None if self.model is None else vars(self.model).get("generate")


class WithItsCall(GenerateManager):
    """Answers a request in the context of its HTTP call: ``generate`` knows whether the client still listens."""

    def submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Future:
        if (call := CALL.get()) is not None:
            call.holds = True  # only a stream asks for it
        return super().submit(contextvars.copy_context().run, fn, *args, **kwargs)

    def async_submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        return super().async_submit(contextvars.copy_context().run, fn, *args, **kwargs)


class Generation(GenerationState):
    """Hands every model a `WithItsCall`."""

    def __init__(self, continuous_batching: bool = False) -> None:
        super().__init__(continuous_batching=continuous_batching)
        self._answering: dict[str, WithItsCall] = {}

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        if use_cb:
            return super().get_manager(model_id, use_cb)
        if model_id not in self._answering:
            self._answering[model_id] = WithItsCall()
        return self._answering[model_id]


def refuse_others(asked: dict[str, Any], shared: dict[str, Any]) -> None:
    """
    Raises:
        UnsupportedModeError: what a request asks for is not what all share.
    """
    free = OF_REQUEST if asked["do_sample"] or shared["do_sample"] else (*OF_REQUEST, *OF_SAMPLING)
    given = {name: value for name, value in asked.items() if value is not None and name[0] != "_" and name not in free}
    others = {name: value for name, value in given.items() if value != (shared.get(name) or type(value)())}
    if others:
        said = ", ".join(f"{name}={value!r}" for name, value in others.items())
        raise UnsupportedModeError(
            f"{said}: with --continuous-batching all requests share the model's own generation config, but for the "
            "number of tokens. Leave it out, or serve without --continuous-batching."
        )


class Seeded:
    """Before a handler: the seed of a request is set when its answer begins, not when it arrives.

    Another answer may be drawing random numbers then. With continuous batching there are no seeds, and Transformers
    takes the generation config of the first request for all: what differs from the model's is refused.
    """

    def _build_generation_config(self, body: dict, own: Any, use_cb: bool = False) -> Any:
        seed = body.get("seed")
        body = {name: value for name, value in body.items() if name != "seed"}
        config = super()._build_generation_config(body, own, use_cb=use_cb)
        if use_cb:
            shared = super()._build_generation_config({}, own, use_cb=True)
            refuse_others({"seed": seed} | config.to_dict(), {"seed": None} | shared.to_dict())
        elif (call := CALL.get()) is not None:
            call.seed = seed
        return config


class Chats(Seeded, ChatCompletionHandler):
    """``/v1/chat/completions``"""


class Completions(Seeded, CompletionHandler):
    """``/v1/completions``"""


class Responses(Seeded, ResponseHandler):
    """``/v1/responses``"""
