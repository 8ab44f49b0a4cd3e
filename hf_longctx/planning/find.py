"""Whose memory is counted: a model by a name, without its weights, or one that is loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from ..assets import embedded
from ..config.config import LongCtxConfig, load_shipped
from ..config.files import check_shipped, shipped
from ..config.find import find_name, is_file_name, resolve
from ..config.model import made_for, text_config
from ..errors import ConfigError
from ..model.family import find_family
from ..model.modules import name_of, state_of, unwrap
from .memory import MemoryModel, MemorySettings
from .sizes import dtype_of
from .skeleton import make_skeleton


def find(name: str, settings: MemorySettings, config: str | None = None) -> MemoryModel:
    """A model by a shipped config, a YAML, a local folder or a hub id (of which only config.json is read).

    The ids of shipped configs are known: for them nothing is fetched where the config says how large the model is, and
    config.json is read where it was before.

    Args:
        config: for a folder or hub id, what to patch with: what ``load_named`` takes; None: "auto".

    Raises:
        ConfigError: there is no such model, no config fits it, or a YAML does not say how large the model is.
        UnsupportedModelError: its family cannot be patched, or its working memory is not calculated.
    """
    named = _config_of(name)
    if named is not None and config is not None:
        raise ConfigError(f"{name} is a config itself. Name a model's folder or hub id, or leave config out.")
    if named is not None:
        return _described(name, name, named, settings)
    known = None if os.path.isdir(name) or embedded(name) != name else find_name(name)
    dense = _read(name, fetch=known is None or _unsaid(load_shipped(known)) is not None)
    if dense is None:
        memory_model = _described(name, known, load_shipped(known), settings)
        return (
            memory_model
            if config is None
            else replace(memory_model, config=resolve(config, memory_model.config.model.as_model()))
        )
    find_family(text_config(dense).model_type)
    chosen = resolve(config or "auto", dense)
    return _checked(
        MemoryModel(
            name, make_skeleton(dense, dtype_of(settings.dtype)), dense, settings, chosen, *_told(dense, chosen)
        )
    )


def loaded(model: Any, settings: MemorySettings, config: str | None = None) -> MemoryModel:
    """A loaded model, patched or not, whose parameters are counted as they are; the model itself is left alone.

    Args:
        config: as for ``find``; None: what it is patched with, or "auto".

    Raises:
        ConfigError: no config fits it.
        UnsupportedModelError: this is no Transformers model, or its family cannot be patched.
    """
    state = state_of(model)
    dense = unwrap(model).config if state is None else state.configs[-1].original
    name = name_of(model) or type(unwrap(model)).__name__
    find_family(text_config(dense).model_type)
    if settings.weights is None:
        held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        settings = replace(settings, weights=held)
    chosen = resolve(config or ("auto" if state is None else state.config), dense)
    return _checked(
        MemoryModel(
            name, make_skeleton(dense, dtype_of(settings.dtype)), dense, settings, chosen, *_told(dense, chosen)
        )
    )


def _told(dense: Any, config: LongCtxConfig) -> tuple[int | None, tuple[str, ...]]:
    """(tokens it was made for, notes) of a model whose own config is known."""
    scaled = config.model.rope_note(dense)
    return made_for(dense), () if scaled is None else (scaled,)


def _config_of(name: str) -> LongCtxConfig | None:
    """The config that a path or a shipped name (in any case) is itself; None for a folder or a hub id."""
    if is_file_name(name):
        return LongCtxConfig.from_yaml(name)
    known = None if "/" in name or (os.path.isdir(name) and name not in shipped()) else find_name(name)
    return None if known is None else load_shipped(known)


def _checked(memory_model: MemoryModel) -> MemoryModel:
    """The model, once its model was patched: what cannot be patched is refused before anything is counted."""
    memory_model.patch()
    memory_model.activations  # noqa: B018
    return memory_model


def _read(name: str, fetch: bool) -> Any:
    """The Transformers config of a folder or a hub id; without ``fetch`` None where it was never fetched."""
    path = embedded(name)
    if "/" not in name and not Path(name).exists():
        check_shipped(name, "MODEL (with no / in it, a shipped config)")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=not fetch)
    except (OSError, ValueError) as error:
        if not fetch:
            return None
        said = "is no shipped config and no id of one (hf-longctx configs lists them), no YAML"
        if "/" in name and not os.path.isdir(name) and (known := find_name(name)) is not None:
            said = f"is an id of the config {known}, which does not say {_unsaid(load_shipped(known))}"
        raise ConfigError(
            f"{name!r} {said}, and its config.json cannot be read as a folder's or hub id's: {error}"
        ) from None


def _unsaid(named: LongCtxConfig) -> str | None:
    """What takes memory in the model of a config and is not said in the config, in words; None for nothing."""
    model = named.model
    if model.full_attention_layers is not None:
        return "what the layers keep that are not among full_attention_layers"
    dense = AutoConfig.for_model(model.model_type)
    if any("expert" in key and isinstance(value, int) and value > 1 for key, value in dense.to_dict().items()):
        return f"how large and how many the experts of a {model.model_type} are"
    if type(dense) not in AutoModelForCausalLM._model_mapping:
        return f"how large the model around a {model.model_type} is"
    return None


def _described(name: str, known: str, named: LongCtxConfig, settings: MemorySettings) -> MemoryModel:
    """A model with the sizes of a config of ours, ``known``. Where a token is rotated to costs no memory."""
    model = named.model
    finger = named.model.fingerprint
    sizes = {key: getattr(finger, key) for key in ("hidden_size", "intermediate_size", "vocab_size")}
    missing = [key for key, value in sizes.items() if value is None]
    if missing:
        raise ConfigError(f"{known}: model.fingerprint lacks {', '.join(missing)}. Name the model's folder or hub id.")
    heads = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    sizes |= {key: getattr(model, key) for key in heads}
    find_family(model.model_type)
    if (unsaid := _unsaid(named)) is not None:
        raise ConfigError(f"{known} is a config, which does not say {unsaid}. Name the model's folder or hub id.")
    dense = AutoConfig.for_model(model.model_type, **sizes, sliding_window=None, tie_word_embeddings=False)
    shared = dense.vocab_size * dense.hidden_size * dtype_of(settings.dtype).itemsize
    note = (
        f"{known} is a config: it does not say whether the output layer shares the embeddings (counted as if not; "
        f"{shared / 1e9:.2f} GB less if it does), or that layers have sliding windows of their own (none are counted). "
        "The model's config.json does: name its folder."
    )
    notes = (note,) if settings.weights is None else ()
    return _checked(
        MemoryModel(
            name,
            make_skeleton(dense, dtype_of(settings.dtype)),
            dense,
            settings,
            named,
            model.max_position_embeddings,
            notes,
        )
    )
