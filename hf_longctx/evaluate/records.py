"""What an evaluation has computed so far: JSON lines that survive a kill, one file per process in one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..io.atomic import lock
from ..io.work import check_settings

FILES = "records-*.jsonl"
FORMAT = 1

Record = dict[str, Any]


class Records:
    """The records of a folder. The first line of every file is the header; every other is one variant on one case.

    Args:
        folder: made if it is not there.
        header: plain data; what is under ``settings`` must be the same in every file.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]):
        self.folder = folder
        self.header = {"format": FORMAT, **header}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out: {folder} cannot be made: {error}") from None

    def read(self) -> tuple[list[Record], list[Record]]:
        """(headers, records) of all files; a last line that a kill cut off is left out.

        Raises:
            ConfigError: a file is of a run with other settings, no such file, cannot be read, or has something twice;
                or a process is still writing there.
        """
        headers = []
        records = []
        for path in sorted(self.folder.glob(FILES)):
            try:
                with path.open("rb") as file:
                    self._refuse(path, lock(file, alone=False))
            except OSError as error:
                raise ConfigError(f"out: {path} cannot be read: {error}") from None
            lines = [self._line(path, i, line) for i, line in enumerate(whole_lines(path))]
            if lines:
                self._check(path, lines[0])
                headers.append(lines[0])
                records += lines[1:]
        seen: set[tuple[str, str]] = set()
        for record in records:
            if (key := (record["variant"], record["case"])) in seen:
                raise ConfigError(f"out: {self.folder} has {' on '.join(key)} twice: did two runs write there at once?")
            seen.add(key)
        return headers, records

    def open(self, rank: int) -> Writer:
        """Where this process appends; what a kill cut off there is removed.

        Raises:
            ConfigError: the file cannot be written, or another process is writing to it.
        """
        path = self.folder / FILES.replace("*", str(rank))
        try:
            writer = Writer(path)
        except OSError as error:
            raise ConfigError(f"out: {path} cannot be written: {error}") from None
        self._refuse(path, writer.alone)
        os.truncate(path, sum(map(len, whole_lines(path))))
        if not path.stat().st_size:
            writer.append(self.header)
        return writer

    def _refuse(self, path: Path, alone: bool) -> None:
        if not alone:
            raise ConfigError(
                f"out: another process is writing to {path}. Wait for it, or end it (a launcher that was "
                "killed can leave its processes behind)."
            )

    def _line(self, path: Path, number: int, line: bytes) -> Record:
        try:
            read = json.loads(line)
        except ValueError:
            read = None
        if not isinstance(read, dict) or not ({"variant", "case"} if number else {"format", "settings"}) <= set(read):
            raise ConfigError(f"out: line {number + 1} of {path} is no record of an evaluation. Give another folder.")
        return read

    def _check(self, path: Path, told: Record) -> None:
        of = [{"format": one["format"], **one["settings"]} for one in (told, self.header)]
        check_settings(path, *of, option="out")


class Writer:
    """Appends lines; what ``append`` has returned from is on the disk. ``alone``: no other process writes there."""

    def __init__(self, path: Path):
        self.file = path.open("ab")
        self.alone = lock(self.file, alone=True)

    def append(self, record: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that have an end."""
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
