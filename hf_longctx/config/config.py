"""A config: YAML or plain data -> frozen dataclasses, everything checked when it is made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import ConfigError
from .bounds import MOST
from .files import merge, read_file, read_shipped
from .head_map import NONE
from .model import ModelSection, made_for, model_facts
from .sections import DecodeSection, HeadsSection, PrefillSection, StoresSection, check_counts, check_rows
from .words import check_mapping, check_word, dump, load, make, register_first, spec_word, words

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from ..planning.plan import Plan

ITEMSIZE = 2  # bytes of an element in bf16 and fp16


@dataclass(frozen=True, repr=False)
class LongCtxConfig:
    """One checkpoint's config; ``docs/reference.md`` lists every key.

    Attributes:
        model: what it fits.
        heads: which KV heads need the whole context.
        stores: which tokens the heads of each role cache.
        prefill: which keys a query block reads while a prompt is read.
        decode: which cached keys a decoded token reads.
        kernel: how attention is computed, never what.

    Raises:
        ConfigError: the sections do not fit each other.
    """

    model: ModelSection
    heads: HeadsSection
    stores: StoresSection = field(default_factory=StoresSection)
    prefill: PrefillSection = field(default_factory=PrefillSection)
    decode: DecodeSection = field(default_factory=DecodeSection)
    kernel: str = "auto"

    def __post_init__(self) -> None:
        layers = self.model.num_hidden_layers
        model = self.model
        check_word(self.kernel, kernel_words(), "kernel", register_first("kernels", self.kernel))
        self.heads.check_shape(layers, model.num_key_value_heads, model.full_attention_layers)
        for name, table in self.prefill.tables.items():
            where = f"prefill.tables.{name}.map"
            check_rows(table.map, layers, model.num_attention_heads, where, "query heads")
        self._check_tail()
        self.roles()

    def _check_tail(self) -> None:
        """Raise ConfigError for a dense tail over a store that does not say what it would read."""
        tail = self.prefill.streaming.dense_tail
        store = self.stores.streaming
        if tail and not store.has_tail_reads():
            able = [name for name in words("stores") if load("stores", name).has_tail_reads()]
            raise ConfigError(
                f"prefill.streaming.dense_tail: got {tail}, but store {spec_word(store)!r} does not say what such "
                f"tokens read. What works: 0, or for stores.streaming one of: {', '.join(able)}."
            )

    def __repr__(self) -> str:
        """What a notebook shows: for which model, and how many heads keep every token. ``to_dict`` has all of it."""
        model = self.model
        name = model.ids[0] if model.ids else f"a {model.model_type}"
        origin = self.heads.active.source.get("method", "given")
        return (
            f"LongCtxConfig({name}, {self.retrieval_heads} of {self.kv_heads} KV heads {self.kept} "
            f"(method: {origin}, confidence: {self.heads.confidence}))"
        )

    @classmethod
    def from_yaml(cls, path: str | os.PathLike) -> LongCtxConfig:
        """The config of a file, which may take its defaults from a shipped one (``extends: NAME``).

        Raises:
            ConfigError: the message starts with the path of the file.
        """
        return checked(read_file(path), str(path), cls)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LongCtxConfig:
        """The config of plain data, which may come from a file somebody else made.

        Raises:
            ConfigError: with the full path of the field, what was given and what fits.
        """
        if "extends" in check_mapping(data, "config"):
            raise ConfigError("extends: works in config files only; load_shipped(NAME).override(...) does the same.")
        check_counts(data)
        return make(cls, data)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold; ``from_dict`` gives an equal config back.

        Raises:
            ConfigError: it holds a spec of somebody's own whose class is not registered (``register``).
        """
        return dump(self)

    def to_yaml(self, path: str | os.PathLike) -> None:
        """Write a file that ``from_yaml`` reads back, complete in itself.

        Raises:
            ConfigError: as ``to_dict``.
        """
        Path(path).write_text(self.to_text(), "utf-8")

    def to_text(self) -> str:
        """What ``to_yaml`` writes.

        Raises:
            ConfigError: as ``to_dict``.
        """
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload longctx.yaml",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload the config to a repository of the Hugging Face Hub, which ``patch_model(model, repo_id)`` then reads.

        The repository and the branch are made where they are missing. It gets the file ``longctx.yaml`` and, where it
        has none, a README.md that says what the config is made for and how to use it.

        Args:
            repo_id: "user/repo", or "repo" of the user who is logged in.
            private: whether a repository made here is private; None: as its owner's settings say.
            token: of the Hub; None: of the login that ``hf auth login`` stored.
            revision: the branch; None: the main one.
            create_pr: open a pull request with it instead.

        Returns:
            What ``huggingface_hub.HfApi.create_commit`` returns.

        Raises:
            ConfigError: as ``to_dict``, or the config names a path or is too large to be read.
            huggingface_hub.errors.HfHubHTTPError: what the Hub refuses.
        """
        from .hub import push  # stands on this file

        commit = {"commit_message": commit_message, "create_pr": create_pr, "private": private}
        return push(self, repo_id, revision=revision, token=token, **commit)

    def override(self, **sections: Any) -> LongCtxConfig:
        """A config with these sections laid over this one's; see ``files.merge`` for what replaces what.

        Raises:
            ConfigError: as ``from_dict`` and ``to_dict``.
        """
        return type(self).from_dict(merge(self.to_dict(), sections))

    def roles(self) -> tuple[str, ...]:
        """One text per layer of the whole model, a letter per KV head: R (retrieval), S (streaming), or ``-``.

        ``-``: a layer that is not among ``model.full_attention_layers``; its heads have no role.
        """
        return self._roles

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose heads have roles."""
        own = self.model.full_attention_layers
        return tuple(range(self.model.num_hidden_layers)) if own is None else own

    @property
    def scores(self) -> tuple[tuple[float, ...], ...] | None:
        """The scores in use, ``[layers][KV heads]``, of the layers whose heads have roles; None for roles alone."""
        rows = self.heads.active.scores
        return None if rows is None else tuple(rows[layer] for layer in self.layers)

    @property
    def kv_heads(self) -> int:
        """Number of KV heads that have roles, of all layers."""
        return len(self.layers) * self.model.num_key_value_heads

    @property
    def retrieval_heads(self) -> int:
        """Number of retrieval heads of all layers."""
        return sum(row.count("R") for row in self.roles())

    @property
    def kept(self) -> str:
        """What retrieval heads do, in words."""
        evicts = self.stores.retrieval.by_data and self.stores.retrieval.cached_tokens(MOST) < MOST
        return "are retrieval heads, of which tokens are evicted" if evicts else "keep every token"

    @cached_property
    def _roles(self) -> tuple[str, ...]:
        form = (self.heads.kv_budget_tokens, self.model.head_dim, ITEMSIZE)
        stores = (self.stores.streaming, self.stores.retrieval)
        token = 2 * self.model.head_dim * ITEMSIZE
        return self.heads.roles_for(
            *(Fraction(store.nbytes(*form).device, token) for store in stores), self.model.full_attention_layers
        )

    def kv_bytes(self, tokens: int, number_bytes: int = ITEMSIZE) -> tuple[int, int]:
        """(bytes of a dense KV cache, bytes of what the heads cache) of a sequence after a prompt of so many tokens.

        The spare room of growing stores is not in it, nor are layers whose heads have no role. Where
        ``model.full_attention_layers`` does not say which those are, a model's own sliding windows count as if whole.

        Args:
            number_bytes: bytes of one element: 2 for bf16 and fp16.
        """
        stores = {"R": self.stores.retrieval, "S": self.stores.streaming}
        heads = "".join(self.roles()).replace(NONE, "")
        form = (tokens, self.model.head_dim, number_bytes)
        kept = sum(heads.count(letter) * store.nbytes(*form).device for letter, store in stores.items())
        select = self.decode.retrieval
        indexed = select.index_bytes(self.stores.retrieval.selectable(tokens), *form[1:])
        kept += "".join(self.roles()[select.dense_layers :]).count("R") * indexed
        return 2 * len(heads) * tokens * self.model.head_dim * number_bytes, kept

    @classmethod
    def plan(cls, model: Any, **given: Any) -> Plan:
        """The best config of a model for so many tokens in so much memory; no weight is loaded.

        ``docs/choosing.md`` states the ladder; ``str(plan)`` says what was tried and chosen,
        ``plan.config`` is for ``patch_model`` and ``to_yaml``.

        Args:
            model: a shipped config's name, a YAML, a model's folder or hub id, or a loaded model.
            given: ``context``, tokens of prompt and answer together, in each of ``batch`` sequences (1); ``memory`` in
                all, bytes or a size such as "24GB"; ``dtype`` "bf16" or "fp32"; ``chunk``, the prefill_chunk_size
                (4096); ``weights``, their size where it is not that of the parameters; ``config`` for a folder, a hub
                id or a model (what ``patch_model`` takes); ``reserve``, True for a ``LongCtxCache`` made with
                ``max_tokens``.

        Raises:
            LongCtxError: not even the smallest fits; the message says what it needs and how long a context would fit.
            ConfigError: an argument out of bounds, no such model, or no config for it.
            UnsupportedModelError: its family cannot be patched.
            UnsupportedModeError: as ``patch_model`` with the chosen config.
        """
        from ..planning.plan import plan  # stands on everything that stands on this file

        return plan(model, **given)

    def check_model(self, hf_config: Any) -> None:
        """Raise ConfigError unless the config was made for a model with this Transformers config."""
        wrongs = self.model.mismatches(hf_config)
        if wrongs:
            raise ConfigError(
                f"model: this config was made for another model; it says {'; '.join(wrongs)}. "
                "Take the config of this model, or make one (hf-longctx identify)."
            )

    @classmethod
    def describe(cls, hf_config: Any) -> dict[str, Any]:
        """The ``model`` section, with the whole fingerprint, of a model with this Transformers config; without ids.

        Raises:
            ConfigError: the Transformers config lacks a head dimension.
        """
        facts = model_facts(hf_config)
        fingerprint = facts.pop("fingerprint")
        own = facts.pop("full_attention_layers")
        tokens = made_for(hf_config)
        if type(tokens) is int and 0 < tokens <= MOST:
            facts["max_position_embeddings"] = tokens
        if own is not None:
            facts["full_attention_layers"] = list(own)
        facts["fingerprint"] = fingerprint
        make(ModelSection, facts, "model")
        return facts


def kernel_words() -> tuple[str, ...]:
    """What ``kernel`` may be: auto, stock, or a kernel that is there."""
    return ("auto", "stock", *words("kernels"))


def load_shipped(name: str) -> LongCtxConfig:
    """The shipped config of that name.

    Raises:
        ConfigError: there is none; the message lists them.
    """
    return checked(read_shipped(name), name)


def checked(given: Mapping[str, Any], where: str, cls: type[LongCtxConfig] = LongCtxConfig) -> LongCtxConfig:
    """The config of plain data whose errors start with ``where``, the file that it was read from."""
    try:
        return cls.from_dict(given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
