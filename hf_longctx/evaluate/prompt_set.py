"""A set of the user's own prompts, read and checked as a whole before any of them is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from ..io.json_lines import check_keys, json_lines, name_of, text_of
from .prompts import Prompt, answer_ids, token_ids

KEYS = ("prompt", "messages", "answer", "id")


@dataclass(frozen=True)
class Asked:
    """One prompt.

    Attributes:
        id: what it is called.
        ids: its token ids ``[1, T]`` on the model's device.
        answer: token ids ``[A]`` of the answer given with it, None without one.
    """

    id: str
    ids: Tensor
    answer: Tensor | None


def prompt_set(
    model: nn.Module, prompts: str | Path | Sequence[Mapping[str, Any]], tokenizer: Any, chat: bool = False
) -> list[Asked]:
    """The prompts of a file of JSON lines, or of a list of the same objects; as ``compare_prompts`` takes them.

    Raises:
        ConfigError: a line that cannot be read as a prompt, by its number.
    """
    if isinstance(prompts, str | Path):
        lines = json_lines(prompts, "prompts")
    else:
        if not isinstance(prompts, Sequence) or not all(isinstance(one, Mapping) for one in prompts) or not prompts:
            raise ConfigError(
                f"prompts: got {type(prompts).__name__}, expected a file of JSON lines, or a list of objects like "
                '{"prompt": text, "answer": text}.'
            )
        lines = [(f"prompts: number {number}", dict(one)) for number, one in enumerate(prompts, 1)]
    found: dict[str, Asked] = {}
    for number, (where, line) in enumerate(lines, 1):
        one = _asked(model, where, line, tokenizer, chat, number)
        if one.id in found:
            raise ConfigError(f"{where}: id {one.id!r} is that of an earlier prompt as well.")
        found[one.id] = one
    return list(found.values())


def _asked(model: nn.Module, where: str, line: Mapping[str, Any], tokenizer: Any, chat: bool, number: int) -> Asked:
    check_keys(where, line, KEYS)
    if ("prompt" in line) == ("messages" in line):
        raise ConfigError(f"{where}: expected either prompt, a text, or messages, those of a chat.")
    prompt: Prompt = text_of(where, line, "prompt") if "prompt" in line else _messages(where, line["messages"])
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    answer = text_of(where, line, "answer") if line.get("answer") is not None else None
    name = name_of(where, line, number)
    try:
        ids = token_ids(model, prompt, tokenizer)
        rest = None if answer is None else ids.new_tensor(answer_ids(prompt, ids[0].tolist(), answer, tokenizer))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return Asked(name, ids, rest)


def _messages(where: str, messages: Any) -> list[dict[str, str]]:
    keys = ("role", "content")
    fits = isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages)
    if not fits or any(not isinstance(one.get(key), str) for one in messages for key in keys):
        raise ConfigError(f'{where}: messages: expected a list of objects like {{"role": "user", "content": text}}.')
    if messages[-1]["role"] == "assistant":
        raise ConfigError(f"{where}: messages: the last one is the assistant's; what it said belongs under answer.")
    return messages
