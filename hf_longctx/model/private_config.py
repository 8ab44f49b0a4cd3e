"""The config objects of a patched model: private copies of its own, which other models may share.

A multimodal model has the config of its text inside of another, and both are copied::

    Qwen2VLConfig --copied--> Qwen2VLConfig'
      text_config               text_config'  <- gets ``longctx`` and our attention word
      vision_config             vision_config, the same object
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

OURS = ("longctx", "_attn_implementation")  # what patching writes; the second begins two names


@dataclass
class PrivateConfig:
    """One config object and its private copy.

    Attributes:
        original: the model's own.
        private: what the model has while it is patched.
        snapshot: the attributes of the private one right after patching.
    """

    original: Any
    private: Any
    snapshot: dict[str, Any]

    @classmethod
    def of(cls, original: Any, private: Any) -> PrivateConfig:
        return cls(original, private, copy.deepcopy(vars(private)))

    def put(self, holder: nn.Module) -> None:
        """Give every module the private copy in place of the original."""
        _swap(holder, self.original, self.private)

    def put_back(self, holder: nn.Module) -> None:
        """Give every module the original again."""
        _swap(holder, self.private, self.original)

    def keep_edits(self) -> None:
        """Carry what was changed on the private copy since patching over to the original."""
        for name, value in vars(self.private).items():
            ours = name.startswith(OURS) or isinstance(value, PreTrainedConfig)
            if not ours and (name not in self.snapshot or self.snapshot[name] != value):
                setattr(self.original, name, value)


def around(model: nn.Module, private: PrivateConfig) -> Iterator[PrivateConfig]:
    """Copies of the configs that have the text's inside, from the inner to the outer, each with the copy inside it."""
    held = {
        id(value): value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, PreTrainedConfig)
    }
    inner = private
    while True:
        found = [(one, name) for one in held.values() for name, value in vars(one).items() if value is inner.original]
        if not found:
            return
        outer, name = found[0]
        copied = copy.copy(outer)
        setattr(copied, name, inner.private)
        inner = PrivateConfig.of(outer, copied)
        yield inner


def _swap(model: nn.Module, old: Any, new: Any) -> None:
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)
