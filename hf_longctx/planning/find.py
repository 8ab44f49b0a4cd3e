"""Whose memory is counted: a model by a name, without its weights, or one that is loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..assets import embedded
from ..config.config import LongCtxConfig, load_shipped
from ..config.files import check_shipped, shipped
from ..config.find import find_name, is_file_name, resolve
from ..config.model import made_for
from ..errors import ConfigError, UnsupportedModelError
from ..model.family import find_family
from ..model.modules import language_model, name_of, state_of, unwrap
from .memory import MemoryModel, MemorySettings
from .sizes import dtype_of

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # what families call their number


def find(name: str, settings: MemorySettings, config: str | None = None) -> MemoryModel:
    """A model by a shipped config, a YAML, a local folder or a hub id (of which only config.json is read).

    The ids of shipped configs are known: for them nothing is fetched, and config.json is read where it was before.

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
    dense = _read(name, fetch=known is None)
    if dense is None:
        memory_model = _described(name, known, load_shipped(known), settings)
        return (
            memory_model
            if config is None
            else replace(memory_model, config=resolve(config, memory_model.config.model.as_model()))
        )
    _check_dense(name, dense)
    chosen = resolve(config or "auto", dense)
    return _checked(MemoryModel(name, _meta(dense, settings), dense, settings, chosen, *_told(dense, chosen)))


def loaded(model: Any, settings: MemorySettings, config: str | None = None) -> MemoryModel:
    """A loaded model, patched or not, whose parameters are counted as they are; the model itself is left alone.

    Args:
        config: as for ``find``; None: what it is patched with, or "auto".

    Raises:
        ConfigError: no config fits it.
        UnsupportedModelError: this is no Transformers model, or its family cannot be patched.
    """
    state = state_of(model)
    base = language_model(model)
    dense = base.config if state is None else state.original
    name = name_of(model) or type(unwrap(model)).__name__
    _check_dense(name, dense)
    if settings.weights is None:
        held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        settings = replace(settings, weights=held)
    chosen = resolve(config or ("auto" if state is None else state.config), dense)
    return _checked(MemoryModel(name, _meta(dense, settings), dense, settings, chosen, *_told(dense, chosen)))


def _told(dense: Any, config: LongCtxConfig) -> tuple[int | None, tuple[str, ...]]:
    """(tokens it was made for, notes) of a model whose own config is known."""
    scaled = config.model.rope_note(dense)
    return made_for(dense), () if scaled is None else (scaled,)


def _check_dense(name: str, dense: Any) -> None:
    """Refuse what cannot be patched, or whose working memory the rule above does not give."""
    find_family(dense.model_type)
    for key in EXPERTS:
        count = getattr(dense, key, None)
        if isinstance(count, int) and count > 1:
            raise UnsupportedModelError(
                f"{name} is a mixture of experts ({key} {count}). What its experts hold while a prompt is read is not "
                "calculated, and a dense MLP would be counted instead; plan and bench memory are for dense MLPs only."
            )


def _config_of(name: str) -> LongCtxConfig | None:
    """The config that a path or a shipped name (in any case) is itself; None for a folder or a hub id."""
    if is_file_name(name):
        return LongCtxConfig.from_yaml(name)
    known = None if "/" in name or (os.path.isdir(name) and name not in shipped()) else find_name(name)
    return None if known is None else load_shipped(known)


def _meta(dense: Any, settings: MemorySettings) -> Any:
    """The model of a Transformers config, without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(dense, dtype=dtype_of(settings.dtype))
    model.tie_weights()  # Transformers 5.0 leaves that out on the meta device
    return model


def _checked(memory_model: MemoryModel) -> MemoryModel:
    """The model, once its model was patched: what cannot be patched is refused before anything is counted."""
    memory_model.patch()
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
        raise ConfigError(
            f"{name!r} is no shipped config and no id of one (hf-longctx configs lists them), no YAML, and its "
            f"config.json cannot be read as a folder's or hub id's: {error}"
        ) from None


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
    dense = AutoConfig.for_model(model.model_type, **sizes, sliding_window=None, tie_word_embeddings=False)
    shared = dense.vocab_size * dense.hidden_size * dtype_of(settings.dtype).itemsize
    note = (
        f"{known} is a config: it does not say whether the output layer shares the embeddings (counted as if not; "
        f"{shared / 1e9:.2f} GB less if it does), or that layers have sliding windows of their own (none are counted). "
        "The model's config.json does: name its folder."
    )
    notes = (note,) if settings.weights is None else ()
    return _checked(
        MemoryModel(name, _meta(dense, settings), dense, settings, named, model.max_position_embeddings, notes)
    )
