"""The file of a long run that can be resumed, and the settings that must be the same then."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .atomic import written_whole

if TYPE_CHECKING:
    from torch import Tensor

    from .processes import Processes


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


def check_settings(path: Path, told: Mapping[str, Any], settings: Mapping[str, Any], option: str = "work") -> None:
    """Raise ConfigError unless the settings ``told`` in a file are those of this run; ``option`` named its folder."""
    wanted = json.loads(json.dumps(settings))
    differ = sorted(name for name in {*told, *wanted} if told.get(name) != wanted.get(name))
    if differ:
        was = ", ".join(f"{name} (was {told.get(name)!r}, is {wanted.get(name)!r})" for name in differ)
        raise ConfigError(
            f"{option}: {path} is of a run with other settings: {was}. Remove it, or give another folder."
        )


def save_state(path: Path, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write a state whole or not at all: a run that is cut off leaves the file of before."""
    from safetensors.torch import save_file

    with written_whole(path) as unfinished:
        save_file(dict(state), unfinished, metadata={"settings": json.dumps(settings)})


def load_state(path: Path, settings: Mapping[str, Any], names: Iterable[str], run: str) -> dict[str, Tensor] | None:
    """The tensors ``names`` that ``save_state`` wrote, or None where there is no file.

    Raises:
        ConfigError: the file is no state of a ``run``, or was written under other settings.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            told = dict(json.loads(file.metadata()["settings"]))
            state = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"work: {path} is no state of a {run} run ({error}). Remove it, or give another folder."
        ) from None
    check_settings(path, told, settings)
    return state


def found_state(
    path: Path, settings: Mapping[str, Any], names: Iterable[str], run: str, ranks: Processes
) -> dict[str, Tensor] | None:
    """The state in ``path`` as ``load_state`` gives it, read by the main process, as others may not see its disk.

    The folder is made at once, because the first state may be hours away.

    Raises:
        ConfigError: the folder cannot be made, or the file is of another run; on every process.
    """
    found = None
    if ranks.main:
        try:
            found = load_state(work_file(path.parent, path.name), settings, names, run)
        except ConfigError as error:
            found = error
    found = ranks.share(found)
    if isinstance(found, ConfigError):
        raise found
    return found
