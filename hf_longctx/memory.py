"""What a context takes in memory, dense and patched, and the longest that fits: a calculation in bytes.

``bench memory`` and ``plan`` stand on it. Weights + KV cache + the working memory of a prefill. The KV cache is counted
slot by slot, spare room included, and ``bench memory --check`` allocates it for real: as ``generate`` makes it, or with
``max_tokens``, where it also holds what streaming heads remember to take tokens back. The working memory is what one
layer's forward of one chunk of the prompt holds:

- its activations, in numbers per token: 4 hidden + 3 intermediate + 2 head_dim in the MLP, or
  3 hidden + 2 query heads x head_dim + 2 KV heads x head_dim + 2 head_dim in the attention, whichever needs more;
- dense, from the second chunk on: Transformers' sdpa takes a mask of chunk x context (one byte each, and once more in
  the dtype for every row) and, with grouped query heads, copies of the keys and values for every query head;
- patched: in place of these, while a layer's buffer grows, its old one, at most as large as the new one.

On a CPU torch's profiler agrees with this (tests/bench). Kernels for GPUs may hold more.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .assets import embedded
from .config import LongCtxConfig, load_shipped
from .config_files import shipped
from .config_find import find_name, is_file_name, resolve
from .errors import ConfigError, UnsupportedModelError
from .family import find_family
from .layer_plan import LayerPlan
from .patch import attention_modules, make_plan, patch_model, state_of, unwrap
from .registry import check_word, wrong
from .sizes import DTYPES, dtype_of
from .stores.base import SLACK

MOST = 1 << 40  # tokens: what fits more than this has no limit
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # what families call their number
UNKNOWN_LENGTH = (
    "how many tokens the model was made for is not known: model.max_position_embeddings of the config does not say it"
)
DENSE, PATCHED, RESERVED = "dense", "patched", "patched, max_tokens"
WAYS = (DENSE, PATCHED, RESERVED)


@dataclass(frozen=True)
class MemorySettings:
    """What is asked.

    Attributes:
        memory: bytes in all.
        dtype: word of ``sizes.DTYPES``, of weights, cache and activations.
        batch: rows of the same length.
        chunk: tokens of the prompt per forward (``prefill_chunk_size``); 0 for all of them.
        weights: bytes of the weights, None to count the parameters.
    """

    memory: int
    dtype: str = "bf16"
    batch: int = 1
    chunk: int = 4096
    weights: int | None = None
    default_shape = False  # no goals are stated for it

    def __post_init__(self) -> None:
        check_word(self.dtype, DTYPES, "dtype")
        for name, least in (("memory", 1), ("batch", 1), ("chunk", 0), ("weights", 0)):
            number = getattr(self, name)
            if (type(number) is not int or number < least) and not (name == "weights" and number is None):
                raise wrong(name, number, f"a whole number, at least {least}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Need:
    """Bytes that one way needs for a context of ``tokens`` tokens in each row."""

    tokens: int
    weights: int
    kv: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.working

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Subject:
    """A model without weights, a config for it, and what is to be counted of them.

    Attributes:
        model: on the ``meta`` device.
        dense: the Transformers config, for a dense cache.
        config: what to patch with. Its ``model`` section may say less than ``dense``, or more.
        made_for: tokens the model was made for; None where that is not known.
        notes: what is not known of it, in words.
    """

    name: str
    model: Any
    dense: Any
    settings: MemorySettings
    config: LongCtxConfig
    made_for: int | None = None
    notes: tuple[str, ...] = ()

    def patch(self) -> Any:
        """The model, patched with the config; errors as ``patch_model``."""
        return patch_model(self.model, {**self.config.to_dict(), "model": LongCtxConfig.describe(self.dense)})

    @cached_property
    def plans(self) -> tuple[LayerPlan, ...]:
        """The plan of every layer, as a patched model has it."""
        family = find_family(self.dense.model_type)
        modules = attention_modules(self.model.base_model, family)
        return tuple(make_plan(module, self.config, family, self.dense) for module in modules)

    @property
    def kv_heads(self) -> int:
        return len(self.plans[0].roles)

    @cached_property
    def head_dim(self) -> int:
        return LongCtxConfig.describe(self.dense)["head_dim"]

    @property
    def number(self) -> int:
        """Bytes of one number."""
        return dtype_of(self.settings.dtype).itemsize

    @cached_property
    def weights(self) -> int:
        if self.settings.weights is not None:
            return self.settings.weights
        return sum(parameter.numel() for parameter in self.model.parameters()) * self.number

    def need(self, way: str, tokens: int) -> Need:
        """What ``way`` needs for ``tokens`` tokens."""
        return Need(tokens, self.weights, self.kv(way, tokens), self._working(way, tokens))

    def kv(self, way: str, tokens: int) -> int:
        """Bytes of the KV cache of all rows. With several chunks a growing buffer may have less spare room."""
        return sum(self.layer_bytes(plan, way, tokens) for plan in self.plans)

    def layer_bytes(self, plan: Any, way: str, tokens: int) -> int:
        """Bytes of all KV heads of a layer, in all rows."""
        if way == DENSE:
            window = plan.stores["streaming"].recent if plan.sliding else None
            return len(plan.roles) * (tokens if window is None else self._windowed(tokens, window)) * self._slot
        max_tokens, slack = (tokens, SLACK) if way == RESERVED else (None, 0)
        form = (tokens, self.head_dim, self.number, max_tokens, slack)
        heads = (len(heads.kv_heads) * plan.stores[heads.role].head_bytes(*form) for heads in plan.heads)
        return sum(heads) * self.settings.batch

    def host(self, tokens: int) -> int:
        """Bytes that stores keep in host memory by choice, in all rows; not in ``kv``."""
        form = (tokens, self.head_dim, self.number)
        parts = [(heads, plan.stores[heads.role]) for plan in self.plans for heads in plan.heads]
        return sum(len(heads.kv_heads) * store.host_bytes(*form) for heads, store in parts) * self.settings.batch

    @property
    def _slot(self) -> int:
        """Bytes of one slot of one KV head, in all rows."""
        return 2 * self.head_dim * self.number * self.settings.batch

    def chunk(self, tokens: int) -> int:
        """Tokens per forward of a prompt."""
        return min(tokens, self.settings.chunk or tokens)

    def _windowed(self, tokens: int, window: int) -> int:
        """Most slots of a dense sliding layer: what it kept before a chunk, and the chunk, of which it keeps a view."""
        chunk = self.chunk(tokens)
        full, last = max(0, tokens // chunk - 1) * chunk, (tokens - 1) // chunk * chunk
        return max(min(past, window - 1) + min(chunk, tokens - past) for past in (0, full, last))

    def _working(self, way: str, tokens: int) -> int:
        config, chunk = self.dense, self.chunk(tokens)
        hidden, heads, width = config.hidden_size, config.num_attention_heads, self.head_dim
        mlp = 4 * hidden + 3 * config.intermediate_size + 2 * width
        attention = 3 * hidden + 2 * (heads + self.kv_heads + 1) * width
        mlp, attention = (chunk * part * self.number * self.settings.batch for part in (mlp, attention))
        if way == DENSE and chunk < tokens:
            mask = chunk * tokens
            mlp, attention = mlp + mask, attention + mask * (1 + self.number * self.settings.batch)
            if heads > self.kv_heads:
                attention += tokens * heads * self._slot
        grown = max(self.layer_bytes(plan, way, tokens) for plan in self.plans) if way == PATCHED else 0
        return max(mlp, attention, grown)


def longest(subject: Subject, way: str) -> int | None:
    """Tokens of the longest context whose need fits into the memory; 0 for none, None where there is no limit."""

    def fits(tokens: int) -> bool:
        return subject.need(way, tokens).total <= subject.settings.memory

    if fits(MOST):
        return None
    low, high = 0, 1  # low fits, high does not
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def find(name: str, settings: MemorySettings, config: str | None = None) -> Subject:
    """A model by a shipped config, a YAML, a local folder or a hub id (of which only config.json is read).

    The ids of shipped configs are known: for them nothing is fetched, and config.json is read where it was before.

    Args:
        config: for a folder or hub id, what to patch with: a shipped name or id, or a YAML; None: "auto".

    Raises:
        ConfigError: there is no such model, no config fits it, or a YAML does not say how large the model is.
        UnsupportedModelError: its family cannot be patched, or its working memory is not calculated.
    """
    named = _config_of(name)
    if named is not None and config is not None:
        raise ConfigError(f"{name} is a config itself. Name a model's folder or hub id, or leave config out.")
    if named is not None:
        return _described(name, named, settings)
    known = None if os.path.isdir(name) or embedded(name) != name else find_name(name)
    dense = _read(name, fetch=known is None)
    if dense is None:
        subject = _described(name, load_shipped(known), settings)
        return subject if config is None else replace(subject, config=resolve(config, subject.config.model.as_model()))
    _check_dense(name, dense)
    chosen = resolve(config or "auto", dense)
    return _checked(Subject(name, _meta(dense, settings), dense, settings, chosen, *_told(dense, chosen)))


def loaded(model: Any, settings: MemorySettings, config: str | None = None) -> Subject:
    """A loaded model, patched or not, whose parameters are counted as they are; the model itself is left alone.

    Args:
        config: as for ``find``; None: what it is patched with, or "auto".

    Raises:
        ConfigError: no config fits it.
        UnsupportedModelError: this is no Transformers model, or its family cannot be patched.
    """
    state, base = state_of(model), unwrap(model).base_model
    dense = base.config if state is None else state.original
    name = getattr(dense, "_name_or_path", None) or type(unwrap(model)).__name__
    _check_dense(name, dense)
    if settings.weights is None:
        held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        settings = replace(settings, weights=held)
    chosen = resolve(config or ("auto" if state is None else state.config), dense)
    return _checked(Subject(name, _meta(dense, settings), dense, settings, chosen, *_told(dense, chosen)))


def _told(dense: Any, config: LongCtxConfig) -> tuple[int | None, tuple[str, ...]]:
    """(tokens it was made for, notes) of a model whose own config is known."""
    scaled = config.model.rope_note(dense)
    return getattr(dense, "max_position_embeddings", None), () if scaled is None else (scaled,)


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


def _checked(subject: Subject) -> Subject:
    """The subject, once its model was patched: what cannot be patched is refused before anything is counted."""
    subject.patch()
    return subject


def _read(name: str, fetch: bool) -> Any:
    """The Transformers config of a folder or a hub id; without ``fetch`` None where it was never fetched."""
    path = embedded(name)
    if "/" not in name and not Path(name).exists():
        check_word(name, shipped(), "MODEL (with no / in it, a shipped config)")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=not fetch)
    except (OSError, ValueError) as error:
        if not fetch:
            return None
        raise ConfigError(
            f"{name!r} is no shipped config and no id of one (hf-longctx configs lists them), no YAML, and its "
            f"config.json cannot be read as a folder's or hub id's: {error}"
        ) from None


def _described(name: str, named: LongCtxConfig, settings: MemorySettings) -> Subject:
    """A model with the sizes of a config of ours. Where a token is rotated to costs no memory."""
    model, finger = named.model, named.model.fingerprint
    sizes = {key: getattr(finger, key) for key in ("hidden_size", "intermediate_size", "vocab_size")}
    missing = [key for key, value in sizes.items() if value is None]
    if missing:
        raise ConfigError(f"{name}: model.fingerprint lacks {', '.join(missing)}. Name the model's folder or hub id.")
    heads = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    sizes |= {key: getattr(model, key) for key in heads}
    find_family(model.model_type)
    dense = AutoConfig.for_model(model.model_type, **sizes, sliding_window=None, tie_word_embeddings=False)
    shared = dense.vocab_size * dense.hidden_size * dtype_of(settings.dtype).itemsize
    note = (
        f"{name} is a config: it does not say whether the output layer shares the embeddings (counted as if not; "
        f"{shared / 1e9:.2f} GB less if it does), or that layers have sliding windows of their own (none are counted). "
        "The model's config.json does: name its folder."
    )
    notes = (note,) if settings.weights is None else ()
    made_for = model.max_position_embeddings
    return _checked(Subject(name, _meta(dense, settings), dense, settings, named, made_for, notes))
