"""What one layer's selection knows while a cache lives: the index of each sequence's keys, and what was chosen last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..layout.rows import Rows
from ..layout.segments import HeadKV
from .base import Cached, Chosen, Index, Select

TAKEN_BACK = 256  # tokens: of so many the choices are remembered; taking more back, a choice is made again
ALL = -1  # stands for all sequences of a batch


@dataclass(eq=False)
class Choice:
    """A choice that is used again.

    Attributes:
        position: of the query that chose.
        q: that query, ``[B, H, 1, D]``; None where nobody compares it.
    """

    position: int
    chosen: Chosen
    q: Tensor | None


@dataclass(eq=False)
class Part:
    """Of sequences of one length, which choose together."""

    index: Index
    choices: list[Choice] = field(default_factory=list)

    def crop(self, tokens: int) -> None:
        self.index.crop(tokens)
        self.choices = [one for one in self.choices if one.position < tokens]

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.index.map_rows(change)
        self.choices = [
            replace(one, chosen=one.chosen.map_rows(change), q=None if one.q is None else change(one.q))
            for one in self.choices
        ]

    def fork(self) -> Part:
        return Part(self.index.fork(), list(self.choices))

    def remember(self, choice: Choice) -> None:
        """Beside those that may be valid again after drafts were rejected."""
        before = [one for one in self.choices if one.position > choice.position - TAKEN_BACK]
        self.choices = [*self.choices[-len(before) - 1 :], choice]

    def tensors(self) -> Iterator[Tensor]:
        yield from self.index.tensors()
        for one in self.choices:
            yield from one.chosen.tensors()
            if one.q is not None:
                yield one.q


def _check(chosen: Chosen) -> None:
    """That a choice is one: kernels read where it says. On a device that is not asked: the answer would take time."""
    entries, counts = chosen.entries, chosen.counts
    if entries.dtype != torch.int32 or (counts is not None and counts.dtype != torch.int32):
        raise ValueError(
            f"a selection gave entries {entries.dtype} and counts {None if counts is None else counts.dtype}, not int32"
        )
    if entries.device.type != "cpu" or not entries.numel():
        return
    if counts is not None:
        entries = entries[torch.arange(entries.shape[2]) < counts[..., None]]
    least, most = (x.item() for x in torch.aminmax(entries)) if entries.numel() else (chosen.low, chosen.low)
    if not chosen.low <= least <= most < max(chosen.high, chosen.low + 1):
        raise ValueError(f"a selection chose entries {least} to {most} of {chosen.low} to {chosen.high}")


class Selection:
    """Of the KV heads of one role in one layer, beside their store.

    Attributes:
        kernel: the config's word.
        max_tokens: what the cache was reserved for; None: it grows.
        parts: by sequence, where lengths differ; else one for all of them, under `ALL`.
    """

    def __init__(self, spec: Select, kernel: str = "auto", max_tokens: int | None = None):
        self.spec = spec
        self.kernel = kernel
        self.max_tokens = max_tokens
        self.parts: dict[int, Part] = {}

    def choose(self, group: slice, q: Tensor, cached: Cached, position: int, scale: float) -> tuple[Chosen, bool]:
        """What the query q ``[B, H, 1, D]`` at ``position`` reads, and whether it was chosen before.

        Args:
            group: these sequences of the batch, all or one.
            cached: all their tokens.
        """
        part = self._part(group)
        spec = self.spec
        rounds = torch.is_autocast_enabled(q.device.type)  # the scores; asking is cheaper than switching off
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False) if rounds else nullcontext():
            if part.choices and self._holds(part.choices[-1], q, position):
                return spec.again(part.choices[-1].chosen, part.index, cached), True
            chosen = spec.choose(q, part.index, cached, position, scale)
        _check(chosen)
        if chosen.estimate is not None and not spec.estimates:
            raise ValueError(
                f"{type(spec).__name__} gave an estimate, and its class does not say so: set estimates to True."
            )
        if spec.refresh > 1:  # without the estimate: as many as may be taken back would be as large as the cache
            kept = replace(chosen, whole=False, estimate=None)
            part.remember(Choice(position, kept, q.detach().clone() if spec.similar is not None else None))
        return chosen, False

    def saw(self, group: slice, q: Tensor, position: int, scale: float) -> None:
        """The queries ``[B, H, T, D]`` of a prompt of these sequences, from ``position`` on."""
        self._part(group).index.saw(q, position, scale)

    def reopen(self, rows: Rows) -> None:
        """A prompt goes on after ``rows``, which are all that was seen: let it be settled anew."""
        for key, part in self.parts.items():
            part.index.reopen(rows.total - rows.start(max(0, key)))
            part.choices = []

    @property
    def waits(self) -> bool:
        """See `Index.waits`."""
        return any(part.index.waits for part in self.parts.values())

    def _holds(self, last: Choice, q: Tensor, position: int) -> bool:
        if last.position // self.spec.refresh != position // self.spec.refresh:
            return False
        if not self.spec.compares(position):
            return True
        pair = (x.flatten().to(torch.promote_types(q.dtype, torch.float32)) for x in (last.q, q.detach()))
        return bool(torch.cosine_similarity(*pair, dim=0) >= self.spec.similar)

    def _part(self, group: slice) -> Part:
        """What is known of these sequences; what was known of each alone is built anew for all, from the keys."""
        key = ALL if group == slice(None) else group.start
        if (key == ALL) != (ALL in self.parts):
            self.parts = {}
        if key not in self.parts:
            self.parts[key] = Part(self.spec.new_index())
        part = self.parts[key]
        part.index.kernel, part.index.max_tokens = self.kernel, self.max_tokens
        return part

    def part_ways(self, batch: int) -> None:
        """From now on the ``batch`` sequences have lengths of their own."""
        if ALL in self.parts:
            whole = self.parts.pop(ALL)
            for row in range(batch):
                self.parts[row] = whole.fork()
                self.parts[row].map_rows(lambda x, row=row: x[row : row + 1])

    def crop(self, rows: Rows, target: int) -> None:
        """Forget all but the first ``target`` slots of ``rows``."""
        for key, part in self.parts.items():
            part.crop(max(0, target - rows.start(max(0, key))))

    def map_rows(self, change: Callable[[Tensor], Tensor], batch: int) -> None:
        """Reorder, repeat or select the ``batch`` sequences."""
        if ALL in self.parts:
            self.parts[ALL].map_rows(change)
            return
        if self.parts:
            old = change(torch.arange(batch)).tolist()
            self.parts = {new: self.parts[row].fork() for new, row in enumerate(old) if row in self.parts}

    def reset(self) -> None:
        self.parts = {}

    def fork(self) -> Selection:
        other = Selection(self.spec, self.kernel, self.max_tokens)
        other.parts = {key: part.fork() for key, part in self.parts.items()}
        return other

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor it keeps alive."""
        for part in self.parts.values():
            yield from part.tensors()


def settle(waiting: Sequence[tuple[Selection, HeadKV]], rows: Rows) -> None:
    """Settle the indexes of selections of all layers, beside what their stores hold; ``rows`` are all that was seen."""
    first = waiting[0][0]
    for key in list(first.parts):
        group, start = (slice(None), 0) if key == ALL else (slice(key, key + 1), rows.start(key))
        found = [
            (one.parts[key].index, held) for one, held in waiting if key in one.parts and one.parts[key].index.waits
        ]
        if found:
            indexes, held = zip(*found, strict=True)
            first.spec.settle(indexes, [one.alone(group, start) for one in held])
