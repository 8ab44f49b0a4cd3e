"""What is said over HTTP: errors as OpenAI's clients read them, and that a client hung up."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import LongCtxError
from .call import CALL, Call, ClientGone

CLIENT_CLOSED = 499  # as nginx says it
STREAM = b"text/event-stream"
# What goes wrong in a request; for Exception itself Starlette would answer, and raise it once more in the server.
WRONG = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError)
CLIENTS = (LongCtxError, RequestValidationError, ValueError)

logger = logging.getLogger(__name__)

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def status_of(error: BaseException) -> int:
    """A sentence of ours, or what Transformers says of an argument, is the client's; all else is the server's."""
    if isinstance(error, HTTPException):
        return error.status_code
    if isinstance(error, ClientGone):
        return CLIENT_CLOSED
    return HTTPStatus.BAD_REQUEST if isinstance(error, CLIENTS) else HTTPStatus.INTERNAL_SERVER_ERROR


def error_of(error: BaseException) -> dict[str, Any]:
    """The ``error`` of an answer."""
    status = status_of(error)
    said = error.detail if isinstance(error, HTTPException) else str(error) or type(error).__name__
    if not isinstance(error, (LongCtxError, HTTPException, RequestValidationError)):
        said = f"{type(error).__name__}: {error}"
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    return {"message": said, "type": kind, "param": None, "code": None}


def answer_of(error: BaseException) -> JSONResponse:
    """The whole answer; what is the server's fault is logged as well."""
    if status_of(error) == HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("a request failed", exc_info=error)
    return JSONResponse({"error": error_of(error)}, status_code=status_of(error))


def say_errors(app: FastAPI) -> None:
    """Answer errors as OpenAI does."""

    def said(request: Request, error: Exception) -> JSONResponse:
        return answer_of(error)

    for kind in (*CLIENTS, ClientGone, HTTPException, *WRONG):
        app.add_exception_handler(kind, said)


class Listens:
    """The outermost part of the server: makes the `Call` of every request, and notes when its client hangs up.

    A stream begins when its answer does, or with an error in its place, which is then a plain answer with its status.

    Args:
        calls: gets every call while it is served.
    """

    def __init__(self, app: Any, calls: set[Call]):
        self.app = app
        self.calls = calls

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        call = Call(asyncio.get_running_loop())
        asked = asyncio.Event()

        async def received() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                call.hang_up()
            elif not message.get("more_body"):
                asked.set()
            return message

        CALL.set(call)
        self.calls.add(call)
        watch = asyncio.create_task(_watch(asked, received))
        try:
            await self.app(scope, received, Says(call, scope, receive, send))
        finally:
            watch.cancel()
            call.hang_up()
            self.calls.remove(call)


class Says:
    """Sends what a request is answered."""

    def __init__(self, call: Call, scope: dict, receive: Receive, send: Send):
        self.call = call
        self.scope = scope
        self.receive = receive
        self.send = send
        self.streams = False
        self.refused = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and self._of_stream(message):
            self.streams = True
            await self.call.begun()
            if self.call.error is not None:
                self.refused = True
                await answer_of(self.call.error)(self.scope, self.receive, self.send)
        elif self.streams and self.call.error is not None and not self.refused:
            message = {**message, "body": mended(message.get("body", b""), self.call.error)}
        if not self.refused:
            await self.send(message)

    @staticmethod
    def _of_stream(message: Message) -> bool:
        return any(name.lower() == b"content-type" and value.startswith(STREAM) for name, value in message["headers"])


def mended(body: bytes, error: BaseException) -> bytes:
    """A piece of a stream, in which Transformers wrote an error without the form that JSON and OpenAI's clients ask."""
    written = f'data: {{"error": "{error}"}}\n\n'.encode()
    if not body.endswith(written):
        return body
    return body.removesuffix(written) + f"data: {json.dumps({'error': error_of(error)})}\n\n".encode()


async def _watch(asked: asyncio.Event, received: Receive) -> None:
    """Once the request is read, hear the client hang up also where nobody else listens."""
    await asked.wait()
    while (await received())["type"] != "http.disconnect":
        pass
