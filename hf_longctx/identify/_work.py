"""What a long run saves on its way: a file in the work folder, written whole, that other settings are kept from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..patch import unwrap


def work_file(work: Path | None, name: str) -> Path | None:
    """Where the state is saved; the folder is made at once, because the first state may be hours away.

    Raises:
        ConfigError: the folder cannot be made.
    """
    if work is None:
        return None
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"work: {work} cannot be made: {error}") from None
    return work / name


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write ``path``, which is there whole or not at all: a run that is cut off leaves the file of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    yield unfinished
    os.replace(unfinished, path)


def check_settings(path: Path, told: Mapping[str, Any], settings: Mapping[str, Any], option: str = "work") -> None:
    """Raise ConfigError unless the settings ``told`` in a file are those of this run; ``option`` named its folder."""
    wanted = json.loads(json.dumps(settings))
    differ = sorted(name for name in {*told, *wanted} if told.get(name) != wanted.get(name))
    if differ:
        was = ", ".join(f"{name} (was {told.get(name)!r}, is {wanted.get(name)!r})" for name in differ)
        raise ConfigError(
            f"{option}: {path} is of a run with other settings: {was}. Remove it, or give another folder."
        )


def model_hash(model: nn.Module) -> str:
    """Of the names and shapes of all weights and the first values of each: reading all of them would take minutes."""
    told = hashlib.sha256()
    for name, weight in unwrap(model).named_parameters():
        told.update(f"{name}{tuple(weight.shape)}".encode())
        if not weight.is_meta:
            told.update(weight.detach().flatten()[:8].float().cpu().numpy().tobytes())
    return told.hexdigest()[:16]
