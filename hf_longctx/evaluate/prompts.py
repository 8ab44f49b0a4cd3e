"""A prompt in whatever form a user has it, as token ids, and the tokens that end its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..model.modules import unwrap
from ..prompts.template import templated
from ..tasks.answer import input_device
from ..tasks.haystack import is_tiny_language
from ..tasks.language import parted

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


def perplexity_text(given: str | Path, tokenizer: Any) -> str:
    """The text of a file; of the novel that ships with the package for "book", unless there is a file of that name.

    Raises:
        ConfigError: as ``read_text``; or "book" for the embedded models, whose language it is not in.
    """
    if str(given) != "book" or Path(given).exists():
        return read_text(given, "perplexity")
    if is_tiny_language(tokenizer):
        raise ConfigError("perplexity: the embedded models' language has no words for the book; give a file.")
    from ..assets import BOOK  # here, because ``import hf_longctx`` loads no assets

    return read_text(BOOK, "perplexity")


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
        return torch.tensor(templated(tokenizer, items, tokenize=True, return_dict=True)["input_ids"])
    if items and all(isinstance(item, int) for item in items):
        return torch.tensor(items)
    raise ConfigError(
        f"prompt: got {type(prompt).__name__}, expected a text, a list of chat messages, or the token ids of one "
        "prompt (inputs['input_ids'] of what a tokenizer returns)."
    )


def answer_ids(prompt: Prompt, ids: Sequence[int], answer: str, tokenizer: Any) -> list[int]:
    """Token ids of an answer that follows a text or a chat, without what ends it.

    After messages it begins as the chat template lets an assistant's message begin. After a text a space parts it from
    the last word, unless it has one, or the text ends in a space, a line's end, or an opening quote or bracket.

    Args:
        ids: those of the prompt.

    Raises:
        ConfigError: it has no token of its own.
    """
    if isinstance(prompt, str):
        before = prompt
        answer = answer if prompt[-1].isspace() or answer[0].isspace() else parted(prompt, answer)
        bos = getattr(tokenizer, "bos_token", None)
        special = not (bos and prompt.startswith(bos))
    else:
        before = templated(tokenizer, prompt, tokenize=False)
        answer = _said(tokenizer, prompt, before, answer.strip())
        special = False
    whole = tokenizer(before + answer, add_special_tokens=special, verbose=False)["input_ids"]
    # A tokenizer may join the end of the prompt to what follows, or end every text in a token of its own.
    joint = whole[: len(ids)] == list(ids) and tokenizer(before, add_special_tokens=special)["input_ids"] == list(ids)
    found = whole[len(ids) :] if joint else tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
    if not found:
        raise ConfigError("answer: it has no token of its own.")
    return found


def _said(tokenizer: Any, messages: Sequence[Mapping[str, str]], before: str, answer: str) -> str:
    """The answer with what the template puts between the beginning of an assistant's turn and what is said there."""
    told = [*messages, {"role": "assistant", "content": answer}]
    rendered = templated(tokenizer, told, tokenize=False, add_generation_prompt=False)
    rest = rendered[len(before) :] if rendered.startswith(before) else ""
    lead = rest.partition(answer)[0] if answer in rest else ""
    return answer if lead.strip() else lead + answer  # else: a block that the model would write itself


def _need(tokenizer: Any) -> None:
    if tokenizer is None:
        raise ConfigError("prompt: words need tokenizer=..., the model's own; or give token ids.")


def stops(model: nn.Module) -> frozenset[int]:
    """The tokens that end an answer of ``generate``."""
    inner = unwrap(model)
    stop = getattr(getattr(inner, "generation_config", None) or inner.config, "eos_token_id", None)
    return frozenset([stop] if isinstance(stop, int) else stop or ())
