"""One HTTP request, as the thread that answers it sees it: whether its client still listens, and how far it is."""

from __future__ import annotations

import asyncio
import threading
import time
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Call:
    """A request, shared by the loop that serves it and the thread that answers it.

    As a context it surrounds the answering: an error that leaves it is noted, so that a stream can begin with it.

    Attributes:
        seed: of the random numbers, as the request says; None: it does not.
        holds: its stream begins when it is known whether there will be an answer.
        error: why there is none.
        stopped: its answer was left before its end, because the client was gone.
        first_s: seconds from the request to the first token; None before it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None):
        self.loop = loop
        self.seed: int | None = None
        self.holds = False
        self.error: BaseException | None = None
        self.stopped = False
        self.first_s: float | None = None
        self.start = time.perf_counter()
        self._begun = asyncio.Event()
        self._gone = threading.Event()
        self._pieces = 0

    def __enter__(self) -> Call:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.error = error
        self.begin()

    @property
    def gone(self) -> bool:
        """Whether the client hung up."""
        return self._gone.is_set()

    def hang_up(self) -> None:
        """The client hung up."""
        self._gone.set()

    def begin(self) -> None:
        """There will be an answer, or an error: its stream may begin."""
        if self.loop is not None and not self._begun.is_set() and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._begun.set)

    async def begun(self) -> None:
        """Wait for `begin`, where the stream is held."""
        if self.holds:
            await self._begun.wait()

    def stop_reading(self) -> bool:
        """Asked before every piece of a prompt: whether to leave it. After the first piece the stream may begin."""
        if self._pieces:
            self.begin()
        self._pieces += 1
        return self.gone

    def heard(self) -> bool:
        """Asked after every token: whether to leave it at that."""
        if self.first_s is None:
            self.first_s = time.perf_counter() - self.start
            self.begin()
        self.stopped = self.gone
        return self.stopped


CALL: ContextVar[Call | None] = ContextVar("hf_longctx_call", default=None)


class UntilGone(StoppingCriteria):
    """Ends an answer where its client hung up."""

    def __init__(self, call: Call):
        self.call = call

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.call.heard(), dtype=torch.bool, device=input_ids.device)


class WhileListening:
    """A streamer that shows an answer while its client is there.

    Transformers' own raises in ``put`` where the client is not, in the middle of ``generate``; the answer ends in
    order instead (`UntilGone`), and its cache with it.
    """

    def __init__(self, streamer: Any, call: Call):
        self.streamer = streamer
        self.call = call

    def put(self, value: Tensor) -> None:
        if not self.call.gone:
            self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()
