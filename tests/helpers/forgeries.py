"""Forged cache files: what a true one says, with single values and tensors changed and every checksum right."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hf_longctx.io import tensor_file

Edit = Callable[[dict[str, Tensor], Any], Any]  # changes tensors and told in place; may give other plain data
HUGE = (2**31, 2**40, 2**63, 10**30)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8)  # one of every width


class Forger:
    """Writes files like ``source``, each with one thing changed."""

    def __init__(self, source: Path):
        with safe_open(source, "pt") as file:
            self.tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            self.metadata = {key: file.metadata()[key] for key in ("format", "version")}
            self.told = json.loads(file.metadata()["told"])

    def write(self, path: Path, edit: Edit) -> Path:
        tensors, told = dict(self.tensors), copy.deepcopy(self.told)
        given = edit(tensors, told)
        text = given if isinstance(given, str) else json.dumps(told if given is None else given)
        with path.open("wb") as file:
            tensor_file.write(file, tensors, {**self.metadata, "told": text})
        return path

    def every(self) -> Iterator[tuple[str, Edit]]:
        """(what is changed, edit): every number and word, every object and list, and every tensor."""
        for place in places({key: self.told[key] for key in ("max_tokens", "cache", "kept")}):
            for value in others(at(self.told, place)):
                yield (
                    f"{place} = {repr(value)[:40]}",
                    lambda tensors, told, place=place, value=value: put(told, place, value),
                )
        for name, tensor in self.tensors.items():
            for how, other in changed(tensor).items():
                yield f"{name}: {how}", lambda tensors, told, name=name, other=other: tensors.update({name: other})
            yield f"{name} is gone", lambda tensors, told, name=name: remove(tensors, name)
            yield f"{name} and one more", lambda tensors, told, name=name: tensors.update({name + "x": tensors[name]})


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to everything in plain data, but to itself."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*path, key)
        yield from places(one, (*path, key))


def at(told: Any, place: tuple) -> Any:
    for key in place:
        told = told[key]
    return told


def put(told: Any, place: tuple, value: Any) -> None:
    at(told, place[:-1])[place[-1]] = value


def remove(told: dict, key: str) -> None:
    """Without giving what was there: an edit that gives something gives other plain data."""
    del told[key]


def others(value: Any) -> list:
    """Values that are not this one."""
    found = [None, True, -1, 0, 1.5, float("nan"), "a", [], {}, [value], *HUGE]
    if type(value) is int:
        found += [value + 1, value - 1, -value, value * 2, float(value), str(value)]
    elif isinstance(value, bool):
        found += [not value, int(value)]
    elif isinstance(value, list):
        found += [value[:-1], value + value[-1:], value[::-1], [*value, 0]]
    elif isinstance(value, dict):
        found += [{**value, "more": 0}, *({k: v for k, v in value.items() if k != left} for left in value)]
    elif value is None:
        found += [[0], [1, 2, 3]]
    return [one for one in found if json.dumps(one) != json.dumps(value)]


def changed(tensor: Tensor) -> dict[str, Tensor]:
    """Tensors of another dtype or shape."""
    found = {str(dtype): tensor.to(dtype) for dtype in DTYPES if tensor.dtype != dtype}
    found |= {"flat": tensor.flatten(), "one more dimension": tensor[None], "a number": tensor.flatten()[:1].sum()}
    for dim in range(tensor.dim()):
        size = tensor.shape[dim]
        found |= {
            f"{word} in dimension {dim}": tensor.narrow(dim, 0, min(kept, size))
            for word, kept in (("nothing", 0), ("one less", size - 1), ("one", 1))
            if 0 <= kept < size
        }
        found[f"one more in dimension {dim}"] = torch.cat([tensor, tensor.narrow(dim, 0, min(1, size))], dim)
        found[f"thrice in dimension {dim}"] = torch.cat([tensor] * 3, dim)
    shape = list(tensor.shape)
    return {
        how: one.contiguous() for how, one in found.items() if one.dtype != tensor.dtype or list(one.shape) != shape
    }
