"""The messages of a chat in the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError


def templated(tokenizer: Any, messages: Sequence[Mapping[str, str]], **how: Any) -> Any:
    """What ``apply_chat_template`` gives, by default with the beginning of an answer after the messages.

    Raises:
        ConfigError: there is no template, or it refuses the messages.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("prompt: got messages, but the tokenizer has no chat template. Give the text itself.")
    try:
        return tokenizer.apply_chat_template(list(messages), **{"add_generation_prompt": True, **how})
    except TemplateError as error:
        raise ConfigError(f"prompt: the tokenizer's chat template refuses these messages: {error}") from None
