"""How far a long command is: a bar on a terminal, elsewhere a line now and then; and what Ctrl-C leaves."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing rich takes numbers from Python's random, which importing this library must not
    from rich.console import Console
    from rich.progress import Progress as Bar

# seconds after which a line is due in any case, and before which none is
MINUTE = 60
PAUSE = 10
STEPS = 20  # into which the work is divided: at each a line is due


class Stopped(KeyboardInterrupt):
    """Ctrl-C where progress was shown; ``str()`` says after how much, and what the same command will do."""


class Progress:
    """Shows on stderr how much of something is done, from `__enter__` to `__exit__`; a Ctrl-C inside is `Stopped`.

    Attributes:
        done: how many are done, those of an earlier run too.
        saved: how many of them the same command would not do again.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        *,
        shown: bool = True,
        done: int = 0,
        weight: float | None = None,
        to: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            label: what is going on.
            total: how many there are to do, ``done`` among them.
            unit: what is counted, in the plural.
            shown: False shows nothing, and leaves a Ctrl-C as it is.
            done: how many an earlier run has done, and saved.
            weight: what all that is left weighs; None: each weighs 1.
            to: where to show it; None: stderr.
            clock: seconds.
        """
        self.label = label
        self.total = total
        self.unit = unit
        self.shown = shown
        self.done = self.saved = done
        self._weight = total - done if weight is None else weight
        self._moved = 0.0
        self._clock = clock
        self._to = _stderr() if to is None and shown else to
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        self._start = self._told = self._clock()
        self._step = 0
        if not self.shown:
            return self
        if self._to.is_jupyter or (self._to.is_terminal and not self._to.is_dumb_terminal):
            self._bar = _bar(self._to)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self._weight)
        else:
            self._line(f"{'goes on' if self.done else 'started'}, {self._count}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.shown:
            return
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._line(f"done after {self._elapsed}")
        if isinstance(error, KeyboardInterrupt) and not isinstance(error, Stopped):
            raise Stopped(f"Stopped {self.label} after {self._count}. {self._what_is_kept()}") from None

    def advance(self, weight: float = 1, saved: bool = False) -> None:
        """One more is done; ``saved``: and this and all before it are kept, whatever happens."""
        self.done = self.done + 1
        self._moved = self._moved + weight
        if saved:
            self.saved = self.done
        if not self.shown:
            return
        if self._bar is not None:
            self._bar.advance(self._task, weight)
            return
        now = self._clock()
        share = self._moved / self._weight if self._weight else 1.0
        waited = now - self._told
        step = int(share * STEPS + 1e-9)
        if self.done < self.total and (waited >= MINUTE or (waited >= PAUSE and step > self._step)):
            left = (now - self._start) * (1 - share) / share if share else 0
            self._line(f"{self._count}, {self._elapsed} elapsed, about {timedelta(seconds=round(left))} left")
            self._told = now
            self._step = step

    @property
    def _count(self) -> str:
        return f"{self.done} of {self.total} {self.unit}"

    @property
    def _elapsed(self) -> str:
        return str(timedelta(seconds=round(self._clock() - self._start)))

    def _what_is_kept(self) -> str:
        if self.saved == self.done:
            return "The same command goes on." if self.done else "Nothing is lost."
        if self.saved:
            return f"The same command goes on after {self.saved}."
        return "They are not saved: the same command begins anew." if self.done else "Nothing is lost."

    def _line(self, text: str) -> None:
        self._to.print(f"{self.label}: {text}", markup=False, highlight=False, soft_wrap=True)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _bar(to: Console) -> Bar:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, *times, console=to, speed_estimate_period=3600)
