"""The ``longctx=`` flag of ``from_pretrained``: a drop-in class, and an opt-in for code that cannot be edited.

The flag is saved with the model as ``config.longctx`` (plain data) and restored when the model is loaded again.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from .config import LongCtxConfig
from .errors import ConfigError
from .patch import patch_model

Flag = str | Path | dict | LongCtxConfig | bool | None


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):
    """``transformers.AutoModelForCausalLM`` whose ``from_pretrained`` takes ``longctx=``."""

    @classmethod
    def from_pretrained(cls, *args: Any, longctx: Flag = None, **kwargs: Any) -> Any:
        """Load a model and patch it.

        Args:
            longctx: what ``patch_model`` takes ("auto", a shipped name, a path, a dict, a ``LongCtxConfig``), or True
                for "auto". None: patch when the checkpoint's config.json says so. False: load it dense.
            args, kwargs: as in Transformers.

        Raises:
            UnsupportedModelError, ConfigError: as ``patch_model``.
        """
        # install() wraps the inner call too: False keeps it from patching a second time.
        inner = {"longctx": False} if _installed() else {}
        return apply_flag(super().from_pretrained(*args, **inner, **kwargs), longctx)


def apply_flag(loaded: Any, longctx: Flag) -> Any:
    """Patch what ``from_pretrained`` returned: a model, or (model, loading info)."""
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if longctx is None:
        longctx = "auto" if getattr(model.config, "longctx", None) is not None else False
    if longctx is True:
        longctx = "auto"
    if longctx is not False:
        patch_model(model, longctx)
    return loaded


def install() -> None:
    """Give Transformers' own classes the ``longctx=`` flag, until ``uninstall``. Changes Transformers for this process.

    Raises:
        ConfigError: somebody else replaced ``PreTrainedModel.from_pretrained`` after an earlier ``install``.
    """
    if _installed():
        return
    original = PreTrainedModel.__dict__["from_pretrained"]

    @functools.wraps(original.__func__)
    def from_pretrained(cls, *args: Any, longctx: Flag = None, **kwargs: Any) -> Any:
        return apply_flag(original.__func__(cls, *args, **kwargs), longctx)

    from_pretrained.longctx_original = original
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def uninstall() -> None:
    """Undo ``install``; nothing happens when it is not installed."""
    current = PreTrainedModel.__dict__["from_pretrained"]
    if _installed():
        PreTrainedModel.from_pretrained = current.__func__.longctx_original
    elif hasattr(inspect_wrapped(current), "longctx_original"):
        raise ConfigError("from_pretrained was wrapped again after hf_longctx.install(); undo that first.")


def inspect_wrapped(method: Any) -> Any:
    """The innermost function that keeps ``longctx_original`` in a chain of wrappers, or the last one."""
    function = getattr(method, "__func__", method)
    while not hasattr(function, "longctx_original") and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _installed() -> bool:
    return hasattr(getattr(PreTrainedModel.__dict__["from_pretrained"], "__func__", None), "longctx_original")
