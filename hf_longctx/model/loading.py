"""The ``longctx=`` flag of ``from_pretrained``: a drop-in class, and an opt-in for code that cannot be edited.

The flag is saved with the model as ``config.longctx`` (plain data) and restored when the model is loaded again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto_classes
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from ..config.config import LongCtxConfig
from ..config.model import text_config
from ..errors import ConfigError
from .patch import patch_model

Flag = str | Path | dict | LongCtxConfig | bool | None

# An auto class loads through its model class; the outer of the two calls patches.
_inside: ContextVar[bool] = ContextVar("hf_longctx_inside_from_pretrained", default=False)
_installed: dict[type, tuple[classmethod, classmethod]] = {}  # class -> (its own from_pretrained, ours)


class _TakesFlag:
    """What the auto classes below have before Transformers' own."""

    @classmethod
    def from_pretrained(cls, *args: Any, longctx: Flag = None, **kwargs: Any) -> Any:
        """Load a model and patch it.

        Args:
            longctx: what ``patch_model`` takes ("auto", a shipped name, a path, a Hub repository, a dict, a
                ``LongCtxConfig``), or True for "auto". None: patch when the checkpoint's config.json says so. False:
                load it dense.
            args, kwargs: as in Transformers.

        Raises:
            UnsupportedModelError: as ``patch_model``.
            ConfigError: as ``patch_model``.
        """
        return _load(super().from_pretrained, args, kwargs, longctx)


class AutoModelForCausalLM(_TakesFlag, transformers.AutoModelForCausalLM):
    """``transformers.AutoModelForCausalLM`` whose ``from_pretrained`` takes ``longctx=``."""


class AutoModelForImageTextToText(_TakesFlag, transformers.AutoModelForImageTextToText):
    """``transformers.AutoModelForImageTextToText`` whose ``from_pretrained`` takes ``longctx=``."""


def install() -> None:
    """Give Transformers' own classes the ``longctx=`` flag, until ``uninstall``. Changes Transformers for this process.

    Only calls that give the flag, or load a checkpoint saved with it, behave differently. A second call does nothing.
    """
    if _installed:
        return
    # Auto classes must take the flag themselves: they would write a flag they do not know over a saved config.longctx.
    autos = [auto for auto in vars(auto_classes).values() if _loads_by_itself(auto)]
    for owner in (PreTrainedModel, *dict.fromkeys(autos)):
        original = owner.__dict__["from_pretrained"]
        ours = _with_flag(original)
        _installed[owner] = original, ours
        owner.from_pretrained = ours


def uninstall() -> None:
    """Undo ``install``; nothing happens when it is not installed.

    Raises:
        ConfigError: somebody else replaced ``from_pretrained`` after ``install``; nothing is changed.
    """
    for owner, (_, ours) in _installed.items():
        if owner.__dict__["from_pretrained"] is not ours:
            raise ConfigError(
                f"{owner.__name__}.from_pretrained was replaced after hf_longctx.install(). Undo that first, then call "
                "uninstall() again."
            )
    for owner, (original, _) in _installed.items():
        owner.from_pretrained = original
    _installed.clear()


def _loads_by_itself(auto: Any) -> bool:
    return isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass) and "from_pretrained" in vars(auto)


def _with_flag(original: classmethod) -> classmethod:
    @functools.wraps(original.__func__)
    def from_pretrained(cls, *args: Any, longctx: Flag = None, **kwargs: Any) -> Any:
        return _load(functools.partial(original.__func__, cls), args, kwargs, longctx)

    return classmethod(from_pretrained)


def _load(load: Callable, args: tuple, kwargs: dict[str, Any], longctx: Flag) -> Any:
    """What ``load`` returns, a model or (model, loading info), the model patched as the flag says."""
    if _inside.get() and longctx is None:
        return load(*args, **kwargs)
    token = _inside.set(True)
    try:
        loaded = load(*args, **kwargs)
    finally:
        _inside.reset(token)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if longctx is None:
        longctx = getattr(text_config(model.config), "longctx", None) not in (None, False)
    if longctx is not False:
        patch_model(model, "auto" if longctx is True else longctx)
    return loaded
