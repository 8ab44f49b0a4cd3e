"""Synthetic long-context tasks, generated and seeded: one file and one word per task, and what they are said in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config.words import build, read_fields, wrong
from ..errors import ConfigError

if TYPE_CHECKING:
    from .base import Task

MODES = ("requests", "turns")  # SCBench's multi-request and multi-turn modes
HAYSTACKS = ("sentences", "noise")  # filler where the user gives no text


def task_from(text: str) -> Task:
    """The task that ``needle`` or ``needle:variant=multi_key:needles=8`` names; values are read as YAML reads them.

    Raises:
        ConfigError: unknown task, field or metric, or a value out of bounds; nothing is generated yet.
    """
    word, *pairs = text.strip().split(":")
    fields = read_fields(pairs, f"task {word!r}", "needle:variant=multi_key")
    if "task" in fields:
        raise ConfigError(f"task {word!r}: 'task' is the word before the first colon, not a field.")
    return build("tasks", {"task": word, **fields}, "task", "tasks")


def tasks_from(text: str) -> tuple[Task, ...]:
    """The tasks of a list like ``needle,passkey``, in its order; errors as ``task_from``.

    Raises:
        ConfigError: a task is named twice, or this is no text.
    """
    if not isinstance(text, str):
        raise wrong("tasks", text, "text, with commas between tasks")
    tasks = tuple(task_from(one) for one in text.split(","))
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"tasks: {', '.join(twice)} is named twice.")
    return tasks
