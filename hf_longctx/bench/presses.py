"""A press of kvpress, where that is installed, as one more column of ``bench e2e``."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from ..config.words import check_word
from ..errors import ConfigError

Press = Callable[[Any], AbstractContextManager]  # press(model): the prompt read inside is compressed


def find(text: str) -> Press:
    """The press that ``text`` means: ``NAME`` or ``NAME(field=value, ...)``, values being plain Python ones.

    Raises:
        ConfigError: kvpress is not installed, it has no such press, or the press does not take these fields.
    """
    name, fields = parse(text)
    try:
        kvpress = importlib.import_module("kvpress")
    except ImportError as error:
        raise ConfigError(
            f"kvpress: it cannot be imported here ({error}). Its releases ask for Transformers and NumPy versions of "
            "their own, so make an environment of its own (pip install -e . kvpress) and run the benchmark there."
        ) from None
    base = kvpress.BasePress
    known = sorted(n for n, one in vars(kvpress).items() if isinstance(one, type) and issubclass(one, base))
    check_word(name, known, "kvpress")
    try:
        return getattr(kvpress, name)(**fields)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"kvpress: {text} was refused: {error}") from None


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """(class name, fields), read as data: nothing in the text is run."""
    wrong = ConfigError(f"kvpress: got {text!r}, expected NAME or NAME(field=value, ...) with plain values.")
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            raise wrong
        if any(keyword.arg is None for keyword in node.keywords):
            raise wrong
        return node.func.id, {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
    except (SyntaxError, ValueError):
        raise wrong from None


def kept_share(cache: Any, tokens: int, kv_heads: int) -> float:
    """Keys that a ``DynamicCache`` of one row holds, as a share of ``tokens`` for every KV head of every layer.

    A press that only masks keys out holds all of them.
    """
    return sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in cache.layers) / (
        len(cache.layers) * tokens * kv_heads
    )
