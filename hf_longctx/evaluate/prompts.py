"""A prompt in whatever form a user has it, as token ids, and the tokens that end its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..model.modules import unwrap
from ..tasks.answer import input_device

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]] | Tensor


def token_ids(model: nn.Module, prompt: Prompt, tokenizer: Any = None) -> Tensor:
    """The prompt as int64 token ids ``[1, T]`` on the model's device.

    Raises:
        ConfigError: no prompt of the three kinds (text, messages, token ids), or nothing to read it with.
    """
    ids = _read(prompt, tokenizer)
    ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if ids.dim() != 1 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ConfigError(
            f"prompt: got {ids.dtype} of shape {tuple(ids.shape)}, expected token ids of one prompt, [T]."
        )
    known = model.get_input_embeddings().num_embeddings
    if ids.min() < 0 or ids.max() >= known:
        raise ConfigError(f"prompt: token ids from {ids.min()} to {ids.max()}, but the model knows 0 to {known - 1}.")
    return ids.long()[None].to(input_device(model))


def read_text(path: str | Path, option: str) -> str:
    """A UTF-8 text with something in it; ``option`` named its file.

    Raises:
        ConfigError: it cannot be read, or is empty.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option}: {path} cannot be read: {error}") from None
    if not text.strip():
        raise ConfigError(f"{option}: {path} is empty.")
    return text


def _read(prompt: Prompt, tokenizer: Any) -> Tensor:
    """Token ids of any shape; a text gets special tokens unless it has them already."""
    if isinstance(prompt, Tensor):
        return prompt
    if isinstance(prompt, str):
        _need(tokenizer)
        bos = getattr(tokenizer, "bos_token", None)
        plain = bool(bos) and prompt.startswith(bos)  # a rendered chat, say: a second bos would change the answer
        return torch.tensor(tokenizer(prompt, add_special_tokens=not plain, verbose=False)["input_ids"])
    items = list(prompt) if isinstance(prompt, Sequence) else []
    if items and all(isinstance(item, Mapping) for item in items):
        _need(tokenizer)
        if getattr(tokenizer, "chat_template", None) is None:
            raise ConfigError("prompt: got messages, but the tokenizer has no chat template. Give the text itself.")
        return torch.tensor(
            tokenizer.apply_chat_template(items, add_generation_prompt=True, return_dict=True)["input_ids"]
        )
    if items and all(isinstance(item, int) for item in items):
        return torch.tensor(items)
    raise ConfigError(
        f"prompt: got {type(prompt).__name__}, expected a text, a list of chat messages, or the token ids of one "
        "prompt (inputs['input_ids'] of what a tokenizer returns)."
    )


def _need(tokenizer: Any) -> None:
    if tokenizer is None:
        raise ConfigError("prompt: words need tokenizer=..., the model's own; or give token ids.")


def stops(model: nn.Module) -> frozenset[int]:
    """The tokens that end an answer of ``generate``."""
    inner = unwrap(model)
    stop = getattr(getattr(inner, "generation_config", None) or inner.config, "eos_token_id", None)
    return frozenset([stop] if isinstance(stop, int) else stop or ())
