"""Long-context tasks, generated and seeded, or over texts of the user's own (``jsonl``).

One file and one word of ``synthetic/`` per task.

The files beside that folder are what tasks are said in, and how they are answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..config.words import build, is_spec, read_fields, wrong
from ..errors import ConfigError

if TYPE_CHECKING:
    from .base import Task

ANSWERS = ("greedy", "forced")  # decoded by the model, or given to it: teacher-forced
MODES = ("requests", "turns")  # SCBench's multi-request and multi-turn modes
HAYSTACKS = ("sentences", "book", "noise")  # filler where the user gives no text


def task_from(text: str) -> Task:
    """The task that ``needle`` or ``needle:variant=multi_key:needles=8`` names; values are read as YAML reads them.

    Raises:
        ConfigError: unknown task, field or metric, or a value out of bounds; nothing is generated yet.
    """
    word, *pairs = text.strip().split(":")
    fields = read_fields(pairs, f"task {word!r}", "needle:variant=multi_key")
    if "task" in fields:
        raise ConfigError(f"task {word!r}: 'task' is the word before the first colon, not a field.")
    return build("tasks.synthetic", {"task": word, **fields}, "task", "tasks")


def tasks_from(given: str | Sequence[str | Task]) -> tuple[Task, ...]:
    """The tasks of a list like ``needle,passkey``, in its order; errors as ``task_from``.

    Args:
        given: text, with commas between tasks, or a list of texts and task objects.

    Raises:
        ConfigError: a task is named twice, or this is neither.
    """
    if isinstance(given, str):
        given = given.split(",")
    fits = isinstance(given, (list, tuple)) and given and all(isinstance(one, str) or is_spec(one) for one in given)
    if not fits:
        raise wrong("tasks", given, "text, with commas between tasks, or a list of texts and tasks")
    tasks = tuple(task_from(one) if isinstance(one, str) else _checked(one) for one in given)
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"tasks: {', '.join(twice)} is named twice.")
    return tasks


def _checked(task: Task) -> Task:
    return build("tasks.synthetic", task, "task", "tasks")
