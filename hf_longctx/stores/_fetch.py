"""Pages copied to a GPU one ahead of their reader: on a stream of their own, into two buffers that take turns."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_local = threading.local()  # fetchers of this thread by device, while some `Pages` holds them


class Streams:
    """The side stream of one CUDA device."""

    def __init__(self, device: torch.device):
        self.device, self.side = device, torch.cuda.Stream(device)

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> torch.cuda.Event:
        """Start copying each (into, out), after all that was asked of the device so far; the event of their end."""
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            for into, out in pairs:
                into.copy_(out, non_blocking=True)
                into.record_stream(self.side)
        return self.side.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        """What is asked of the device from now on comes after ``event``."""
        torch.cuda.current_stream(self.device).wait_event(event)


class Fetcher:
    """Reads lists of pages for one device and one thread.

    While the reader computes with one page, the next is copied. With the last page of a list that is the first page of
    the list that followed it the last time: in decoding, that of the next layer.

    Attributes:
        asked: copies started.
        ahead: those of them for another list than the one being read.
    """

    def __init__(self, device: torch.device, streams: Any):
        self.device = device
        self.streams = streams
        self.buffers: list[Tensor | None] = [None, None]
        self.turn = self.asked = self.ahead = 0
        self.coming: tuple | None = None  # what was asked for, its event, its k and v
        self.followers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # first page -> weak next first page
        self.before: weakref.ref | None = None

    def read(self, asked: list[tuple[Any, slice]]) -> Iterator[tuple[Tensor, Tensor]]:
        """k, v on the device of each (page, rows); the next step of the iterator may overwrite them."""
        if not asked:
            return
        head = asked[0][0]
        before = self.before() if self.before is not None else None
        if before is not None and before is not head:
            self.followers[before] = weakref.ref(head)
        self.before = weakref.ref(head)
        for i, one in enumerate(asked):
            if self.coming is None or self.coming[0] != one:
                self._ask(*one)
            _, event, k, v = self.coming
            self.coming = None
            self.streams.wait(event)
            if i + 1 < len(asked):
                self._ask(*asked[i + 1])
            elif (follower := self.followers.get(head)) is not None and (page := follower()) is not None:
                self._ask(page, slice(None))
                self.ahead += 1
            yield k, v

    def _ask(self, page: Any, rows: slice) -> None:
        """Copy a page into the buffer whose reader is done: with two, that is known to lie before this moment."""
        sources = [x[rows] for x in page.read()]
        sizes = [x.nbytes for x in sources]
        if (buffer := self.buffers[self.turn]) is None or buffer.numel() < sum(sizes):
            with torch.inference_mode(False):
                buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
            self.buffers[self.turn] = buffer
        self.turn = 1 - self.turn
        self.asked = self.asked + 1
        flat = buffer[: sum(sizes)].split(sizes)
        k, v = (part.view(x.dtype).view(x.shape) for part, x in zip(flat, sources, strict=True))
        self.coming = ((page, rows), self.streams.copy([(k, sources[0]), (v, sources[1])]), k, v)


def fetcher(device: torch.device) -> Fetcher | None:
    """This thread's fetcher for ``device``; None where the device reads host memory itself."""
    if device.type != "cuda":
        return None
    known = vars(_local).setdefault("fetchers", weakref.WeakValueDictionary())
    if (found := known.get(device)) is None:
        found = known[device] = Fetcher(device, Streams(device))
    return found
