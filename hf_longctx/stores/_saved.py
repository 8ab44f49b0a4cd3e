"""What a cache's file says, before it is believed: numbers of a type and range, tensors of a dtype and shape.

The checksums of a file find damage; anybody can compute them for numbers of their own. So a file is walked once, before
anything is allocated or read: the cache, its layers and its stores each say what must be there, and what nobody spoke
of is refused as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..config.bounds import MOST
from ..errors import CacheError
from ..io.tensor_file import DTYPES
from ..layout.rows import Rows
from ..layout.segments import Segment

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHORT = 200  # characters of a value in a message


def short(value: Any) -> str:
    """A value of JSON for a message; a file can hold one that fills the screen."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= SHORT else f"{text[:SHORT]}..."


@dataclass(frozen=True)
class Told:
    """One value of the file's plain data.

    Attributes:
        path: of the file, for messages.
        where: names that lead to the value, for messages.
        value: what JSON gave.
    """

    path: str
    where: str
    value: Any

    def refuse(self, said: str) -> NoReturn:
        raise CacheError(
            f"{self.path} says what is true of no cache: {self.where}: {said}. Give a file that cache.save wrote, or "
            "read the prompt again and save."
        )

    def fields(self, *names: str) -> dict[str, Told]:
        """The values of an object that has these keys and no other."""
        if not isinstance(self.value, dict) or self.value.keys() != set(names):
            self.refuse(f"got {self._keys()}, expected an object with the keys {', '.join(names) or '(none)'}")
        return {name: Told(self.path, f"{self.where}.{name}", self.value[name]) for name in names}

    def items(self, count: int | None = None) -> list[Told]:
        """The values of a list, of ``count`` of them where that is known."""
        if not isinstance(self.value, list) or count not in (None, len(self.value)):
            self.refuse(f"got {short(self.value)}, expected a list{'' if count is None else f' of {count}'}")
        return [Told(self.path, f"{self.where}[{at}]", value) for at, value in enumerate(self.value)]

    def number(self, low: int = 0, high: int = MOST) -> int:
        """A whole number from ``low`` to ``high``."""
        if type(self.value) is not int or not low <= self.value <= high:
            expected = str(low) if low == high else f"a whole number from {low} to {high}"
            self.refuse(f"got {short(self.value)}, expected {'none' if low > high else expected}")
        return self.value

    def real(self) -> float:
        """A finite number above 0."""
        if type(self.value) is not float or not 0 < self.value < float("inf"):
            self.refuse(f"got {short(self.value)}, expected a number above 0")
        return self.value

    def one_of(self, *choices: Any) -> Any:
        """One of these values, of the same type."""
        if not any(type(self.value) is type(choice) and self.value == choice for choice in choices):
            self.refuse(f"got {short(self.value)}, expected {' or '.join(map(short, choices))}")
        return self.value

    def _keys(self) -> str:
        return ", ".join(map(short, self.value)) or "no keys" if isinstance(self.value, dict) else short(self.value)


@dataclass
class SavedTensors:
    """The tensors of a file: their dtypes and shapes, and which of them somebody spoke of.

    Attributes:
        path: of the file, for messages.
        shapes: dtype (as safetensors names it) and shape by name.
        read: the numbers of one, for the few that are looked at before the others are copied.
    """

    path: str
    shapes: Mapping[str, tuple[str, tuple[int, ...]]]
    read: Callable[[str], Tensor]
    asked: set[str] = field(default_factory=set)

    def check(self, name: str, dtype: torch.dtype, *shape: int) -> None:
        """Raise CacheError unless the tensor is there, of this dtype and shape."""
        self.asked.add(name)
        expected = (DTYPES[dtype], shape)
        if (found := self.shapes.get(name)) != expected:
            got = "is not there" if found is None else f"is {found[0]} {short(list(found[1]))}"
            Told(self.path, f"tensor {name[:SHORT]}", None).refuse(f"it {got}, expected {expected[0]} {list(shape)}")

    def floating(self, name: str, *shape: int) -> torch.dtype:
        """The dtype of a tensor, which is there, of this shape and of one of the usual dtypes of activations."""
        found = self.shapes.get(name, ("",))[0]
        dtype = next((one for one in FLOATING if DTYPES[one] == found), torch.float32)
        self.check(name, dtype, *shape)
        return dtype

    def close(self) -> None:
        """Raise CacheError where the file has tensors that nobody spoke of."""
        if more := sorted(self.shapes.keys() - self.asked):
            Told(self.path, f"tensor {short(more[0])}", None).refuse("no layer and no store has one of that name")


@dataclass
class SavedStore:
    """What a file says about one store, and what is known of that store without it.

    Attributes:
        told: the plain data of `Store.saved`.
        tensors: those of the file; ``prefix`` begins the names of this store's.
        rows: all that was seen (``total``), of how many rows, from which starts on.
        heads, head_dim, dtype: n and D of every tensor, and the layer's dtype.
        staggered: of the cache.
        group: query heads of a KV head.
        more: what the store's plain data has beside segments, state and numbers (`Store.parts`).
    """

    told: Told
    tensors: SavedTensors
    prefix: str
    rows: Rows
    heads: int
    head_dim: int
    dtype: torch.dtype
    staggered: bool
    group: int
    more: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._parts = self.told.fields("segments", "state", "numbers", *self.more)
        self._stated: set[str] = set()  # numbers of which the store said what they may be
        self._segments: dict[str, SavedSegment] = {}
        self._state: set[str] = set()

    @property
    def starts(self) -> tuple[int, ...]:
        """Starts of the rows; one where all rows are alike."""
        return self.rows.starts or (0,)

    def refuse(self, said: str) -> NoReturn:
        self.told.refuse(said)

    def number(self, name: str, low: int, high: int) -> int:
        """One of the attributes that a store names in `Store.numbers`, from ``low`` to ``high``."""
        told = self._parts["numbers"]
        if not isinstance(told.value, dict) or name not in told.value:
            told.refuse(f"got {short(told.value)}, expected a number {name}")
        self._stated.add(name)
        return Told(told.path, f"{told.where}.{name}", told.value[name]).number(low, high)

    def part(self, name: str) -> Told:
        """One of ``more``."""
        return self._parts[name]

    def segments(self) -> dict[str, SavedSegment]:
        """By name, in the order of the file."""
        for told in self._parts["segments"].items():
            parts = told.fields("name", "kind", "tensors", "numbers")
            name = parts["name"].value
            if not isinstance(name, str) or name in self._segments:
                parts["name"].refuse(f"got {short(name)}, expected a name of its own")
            self._segments[name] = SavedSegment(self, name, parts)
        return dict(self._segments)

    def shape(self, state: str) -> tuple[int, ...]:
        """Of a tensor of `Store.state`: what the file says; () where it has none."""
        return self.tensors.shapes.get(f"{self.prefix}state.{state}", ("", ()))[1]

    def state(self, dtype: torch.dtype, **shapes: tuple[int, ...]) -> None:
        """The tensors of `Store.state`, in this order, each with its shape."""
        self._state = set(shapes)
        for told, name in zip(self._parts["state"].items(len(shapes)), shapes, strict=True):
            told.one_of(name)
            self.tensors.check(f"{self.prefix}state.{name}", dtype, *shapes[name])

    def close(self) -> None:
        """Raise CacheError where the file says something that the store's `check` did not speak of."""
        checked = [name for name, segment in self._segments.items() if segment.checked]
        stated = {"segments": checked, "state": self._state, "numbers": self._stated}
        for part in stated:
            told = self._parts[part]
            wrong_type = not isinstance(told.value, dict if part == "numbers" else list)
            if wrong_type or len(told.value) != len(stated[part]):
                told.refuse(f"got {short(told.value)}, of which the store said nothing (Store.check)")


@dataclass
class SavedSegment:
    """What a file says about one segment of a store.

    Attributes:
        checked: whether somebody stated what its tensors must be.
    """

    store: SavedStore
    name: str
    told: Mapping[str, Told]
    checked: bool = False

    @property
    def prefix(self) -> str:
        return f"{self.store.prefix}segments.{self.name}."

    def of_kind(self, kind: type, *numbers: str) -> dict[str, Told]:
        """Its numbers, which are these and no others; it is of the class ``kind``."""
        self.told["kind"].one_of(kind.saved_as)
        return self.told["numbers"].fields(*numbers)

    def holds(self, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Raise CacheError unless it has these tensors, by name with dtype and shape, and no others."""
        names = [told.value for told in self.told["tensors"].items()]
        if names != list(tensors):
            self.told["tensors"].refuse(f"got {short(names)}, expected {short(list(tensors))}")
        for name, (dtype, shape) in tensors.items():
            self.store.tensors.check(f"{self.prefix}{name}", dtype, *shape)
        self.checked = True

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor: what the file says, of any length; () where it has none."""
        return self.store.tensors.shapes.get(f"{self.prefix}{name}", ("", ()))[1]

    def read(self, name: str) -> Tensor:
        """The numbers of one that `holds` has found right."""
        return self.store.tensors.read(f"{self.prefix}{name}")

    def rows(self, told: Mapping[str, Told], shared: bool) -> int:
        """Rows of its tensors: the batch's, or one that all share; only to what is shared nobody writes."""
        batch = self.store.rows.batch
        told["shared"].number(int(shared), int(shared))
        told["rows"].number(batch, batch)
        return 1 if shared and self.shape("k")[:1] == (1,) else batch

    def plain(self, low: int, high: int, capacity: int | None, shared: bool = False) -> int:
        """The length of a plain `Segment`: ``low .. high`` slots.

        Args:
            capacity: most slots of its memory; None: as many as are filled. What is restored is bounded again, see
                `Store.restored`.
        """
        told = self.of_kind(Segment, "rows", "capacity", "shared", "length")
        length = told["length"].number(low, high)
        rows = self.rows(told, shared)
        told["capacity"].number(length, length if capacity is None else capacity)
        shape = (rows, self.store.heads, length, self.store.head_dim)
        self.holds(dict.fromkeys("kv", (self.store.dtype, shape)))
        return length
