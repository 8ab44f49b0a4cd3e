"""The record of a model family: where its attention modules are, and which layers have a sliding window. Data only.

Each file of ``patches/`` (installed as ``hf_longctx.patches``) holds one ``FAMILY``; its name is the ``model_type``.
"""

from __future__ import annotations

import importlib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..config.checks import check_mapping, check_word
from ..config.model import FULL
from ..config.words import registered, words
from ..errors import ConfigError, UnsupportedModelError

SLIDING = Literal["none", "all", "layer_types"]
PATCHED = (FULL, "sliding_attention")  # words of config.layer_types
# Not ``first_bias``: one decoded token's segments do not say where a padded sequence has its first token, nor whether a
# window still has it.
MAPPED = ("softcap", "sinks")


@dataclass(frozen=True)
class Family:
    """How to find the attention of a family's base model.

    Attributes:
        model_type: the ``model_type`` of its config.
        layers: attribute of the base model that holds the decoder layers.
        attention: attribute of a decoder layer that holds the attention module. The module must hand q, and what the
            cache's ``update`` returned, to the registered attention function untouched.
        key_projection: attribute of the attention module, read for the KV heads of this process.
        sliding: which layers see a sliding window: none, all when ``config.sliding_window`` is set, or those that
            ``config.layer_types`` names. Layers to which it gives another type than full or sliding attention (chunked
            attention) go on as Transformers computes them.
        scores: keyword that its attention passes to the attention function -> field of
            `hf_longctx.layout.scores.Scores`: ``{"softcap": "softcap", "s_aux": "sinks"}``. Any other is refused.
        multimodal: model types whose language model is of this type, tested with an image in the prompt.

    Raises:
        ConfigError: another word for ``sliding``, or fields other than ``softcap`` and ``sinks``.
    """

    model_type: str
    layers: str = "layers"
    attention: str = "self_attn"
    key_projection: str = "k_proj"
    sliding: SLIDING = "none"
    scores: Mapping[str, str] = field(default_factory=dict, hash=False)
    multimodal: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_word(self.sliding, typing.get_args(SLIDING), f"Family({self.model_type!r}).sliding")
        where = f"Family({self.model_type!r}).scores"
        mapped = list(check_mapping(self.scores, where).values())
        for one in mapped:
            check_word(one, MAPPED, where)
        if len(set(mapped)) < len(mapped):
            raise ConfigError(f"{where}: got {dict(self.scores)}, expected at most one keyword for each field.")

    def has_roles(self, config, layer_idx: int) -> bool:
        """Whether a layer with attention is patched; one that reads the text in another way is left to Transformers."""
        return self.sliding != "layer_types" or config.layer_types[layer_idx] in PATCHED

    def window(self, config, layer_idx: int) -> int | None:
        """Tokens of the layer's own sliding window, or None."""
        if self.sliding == "none":
            return None
        if self.sliding == "layer_types" and config.layer_types[layer_idx] != "sliding_attention":
            return None
        return config.sliding_window


def families() -> list[str]:
    """The model types that can be patched: the files of ``hf_longctx.patches``, and what was registered."""
    return list(words("patches"))


def find_family(model_type: str) -> Family:
    """The family of ``model_type``.

    Raises:
        UnsupportedModelError: no file of ``patches/`` is named so, and nothing was registered for it.
    """
    if model_type not in families():
        raise UnsupportedModelError(no_record(model_type))
    if model_type in registered["patches"]:
        return registered["patches"][model_type]
    return importlib.import_module(f"hf_longctx.patches.{model_type}").FAMILY


def no_record(model_type: str, tried: str = "patch_model(model) tries one on a tiny copy of the model") -> str:
    """The message about a model type that has no record.

    Args:
        tried: a sentence without its full stop, about what is known of this type.
    """
    return (
        f"model_type '{model_type}' cannot be patched: no record in patches/ is for it. {tried}. "
        f"`hf-longctx configs models` lists the types that work. If its attention hands rotated keys straight "
        f"to Transformers' attention interface, as Llama's does, three lines in patches/{model_type}.py add it:\n\n"
        f"    from hf_longctx import Family\n\n    FAMILY = Family(model_type={model_type!r})\n\n"
        f"or, in your program, hf_longctx.register('family', {model_type!r}, Family(model_type={model_type!r}))."
    )
