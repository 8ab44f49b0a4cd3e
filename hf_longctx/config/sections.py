"""The sections of a config as frozen dataclasses. Their fields are the YAML keys, their defaults live here only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from ..errors import ConfigError
from . import head_map
from .bounds import FREE, MOST, MOST_HEADS, MOST_LAYERS, SCORE, SHARE, TOKENS, TOKENS_OR_NONE
from .words import check_word, spec_word, word, wrong

DEFAULT_FRACTION = 0.5  # of scores with neither retrieval_fraction nor kv_budget


@dataclass(frozen=True)
class Alternative:
    """Another head map for the same model, by another method.

    Attributes:
        source: where the scores come from; metadata, ignored at run time.
        scores: ``[layers][KV heads]``, higher = more retrieval.
        roles: instead of ``scores``, one text per layer, a letter R or S per KV head.
    """

    source: dict = field(default_factory=dict, metadata=FREE)
    scores: tuple[tuple[float, ...], ...] | None = field(default=None, metadata=SCORE)
    roles: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if (self.scores is None) == (self.roles is None):
            given = "neither" if self.scores is None else "both"
            raise ConfigError(f"scores: got {given} of scores and roles, expected exactly one of the two.")


@dataclass(frozen=True)
class HeadsSection(Alternative):
    """Which KV heads need the whole context.

    Attributes:
        retrieval_fraction: share of all KV heads that are retrieval heads, best scores first; 0.5 where scores come
            with neither it nor ``kv_budget``. Over roles 1.0 alone, which makes every head one.
        kv_budget: instead of ``retrieval_fraction``, share of a dense cache's bytes at ``kv_budget_tokens`` tokens.
        kv_budget_tokens: length at which ``kv_budget`` is counted.
        dense_layers: layers whose heads are all retrieval.
        balance: slices of a layer's KV heads that get equally many retrieval heads each (tensor parallel).
        granularity: ``layer`` makes all heads of a layer retrieval or streaming, by their mean score.
        alternatives: other head maps for the same model.
        use: the alternative that stands in for scores, roles and source.
        confidence: ``none`` means that tied scores say nothing, so no cut may fall between them.
        measured: what identification measured; metadata, ignored at run time.
    """

    retrieval_fraction: float | None = field(default=None, metadata=SHARE)
    kv_budget: float | None = field(default=None, metadata={"above": 0.0, "max": 1.0})
    kv_budget_tokens: int = field(default=32768, metadata=TOKENS)
    dense_layers: tuple[int, ...] = field(
        default=(), metadata={"min": 0, "max": MOST_LAYERS - 1, "unit": "layer index"}
    )
    balance: int = field(default=1, metadata={"min": 1, "max": MOST_HEADS, "unit": "slices"})
    granularity: str = field(default="kv_head", metadata={"choices": ("kv_head", "layer")})
    alternatives: dict[str, Alternative] = field(default_factory=dict)
    use: str | None = None
    confidence: str = field(default="none", metadata={"choices": ("measured", "low", "none")})
    measured: dict = field(default_factory=dict, metadata=FREE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use is not None:
            check_word(self.use, self.alternatives, "use")
        if len(set(self.dense_layers)) < len(self.dense_layers):
            raise wrong("dense_layers", self.dense_layers, "every layer once")
        if self.retrieval_fraction is not None and self.kv_budget is not None:
            raise wrong("kv_budget", self.kv_budget, "either it or retrieval_fraction, not both")
        shares = ("retrieval_fraction", "kv_budget")
        given = [name for name in shares if getattr(self, name) is not None]
        if self.active.scores is None and given and not self.everywhere:
            raise wrong(
                given[0], getattr(self, given[0]), "none of it over roles, or 1.0: it can only choose among scores"
            )
        if self.active.scores is not None and not given:
            object.__setattr__(self, "retrieval_fraction", DEFAULT_FRACTION)

    @property
    def everywhere(self) -> bool:
        """Whether every head is a retrieval head, whatever is known of them."""
        return self.retrieval_fraction == 1

    @property
    def active(self) -> Alternative:
        """Where scores or roles and their source are read: the alternative in use, or this section."""
        return self if self.use is None else self.alternatives[self.use]

    @property
    def doubt(self) -> str | None:
        """In words that the heads were measured badly or not at all; None where they were, and for an alternative."""
        if self.use is not None or self.confidence == "measured":
            return None
        if self.confidence == "low":
            return "the confidence of this head map is low: hf-longctx eval says what it costs"
        return "the confidence of this head map is none: nobody measured these heads (hf-longctx identify does)"

    def roles_for(
        self, streaming_tokens: Fraction, retrieval_tokens: Fraction, among: tuple[int, ...] | None = None
    ) -> tuple[str, ...]:
        """Roles per layer; see `head_map.assign` for what a head of each role caches at ``kv_budget_tokens``."""
        form = {"dense_layers": self.dense_layers, "balance": self.balance, "granularity": self.granularity}
        form["among"] = among
        if self.active.roles is not None:
            rows = self.active.roles
            return head_map.given(["R" * len(row) for row in rows] if self.everywhere else rows, **form)
        return head_map.assign(
            self.active.scores,
            fraction=self.retrieval_fraction,
            kv_budget=self.kv_budget,
            kv_budget_tokens=self.kv_budget_tokens,
            streaming_tokens=streaming_tokens,
            retrieval_tokens=retrieval_tokens,
            confidence=self.confidence,
            **form,
        )

    def check_shape(self, layers: int, width: int, among: tuple[int, ...] | None = None) -> None:
        """Raise ConfigError unless every map, used or not, is ``[layers][width]`` (letters R and S in roles).

        In layers that are not ``among`` those with roles there may be any number, or a ``-``.
        """
        maps = {"heads": self} | {f"heads.alternatives.{name}": one for name, one in self.alternatives.items()}
        for path, one in maps.items():
            name, unit = ("scores", "KV heads") if one.roles is None else ("roles", "letters R or S, one per KV head")
            rows = getattr(one, name)
            check_rows(rows, layers, width, f"{path}.{name}", unit)
            for i, row in enumerate(rows):
                letters = {"R", "S"} if among is None or i in among else {"R", "S", head_map.NONE}
                if one.roles is not None and set(row) - letters:
                    raise wrong(f"{path}.roles[{i}]", row, "only the letters R (retrieval) and S (streaming)")


@dataclass(frozen=True)
class StoresSection:
    """Which tokens the heads of each role cache.

    Attributes:
        retrieval: the store of the heads that need the whole context.
        streaming: the store of all others.
    """

    retrieval: Any = word("stores", "store", "retrieval", "full")
    streaming: Any = word("stores", "store", "streaming", "sink_recent")


@dataclass(frozen=True)
class TableUse:
    """Reads the pattern of every query head from a named table.

    Attributes:
        table: its name.
    """

    table: str


@dataclass(frozen=True)
class PrefillTable:
    """A pattern per query head.

    Attributes:
        budgets: patterns with their fields.
        source: where the patterns come from; metadata, ignored at run time.
        map: ``[layers][query heads]``, indices into ``budgets``; entries under streaming KV heads are ignored.
    """

    budgets: tuple[Any, ...] = word("prefill", "pattern", "retrieval")
    map: tuple[tuple[int, ...], ...] = field(metadata={"min": 0, "max": MOST, "unit": "index of a budget"})
    source: dict = field(default_factory=dict, metadata=FREE)

    def __post_init__(self) -> None:
        for i, row in enumerate(self.map):
            for j, index in enumerate(row):
                if index >= len(self.budgets):
                    raise wrong(f"map[{i}][{j}]", index, f"an index into the {len(self.budgets)} budgets")


@dataclass(frozen=True)
class PrefillSection:
    """Which keys a query block of a prompt reads.

    Attributes:
        min_tokens: shorter sequences are read densely by retrieval heads.
        retrieval: one pattern for all query heads, or a table with one for each.
        tables: patterns per query head, by name.
        share_groups: one list per KV group, the union of its query heads' lists.
        streaming: the store's own rule; one value is allowed, ``sink_recent``.
    """

    min_tokens: int = field(default=4096, metadata=TOKENS_OR_NONE)
    retrieval: Any = word("prefill", "pattern", "retrieval", "dense", instead=TableUse)
    tables: dict[str, PrefillTable] = field(default_factory=dict)
    share_groups: bool = False
    streaming: Any = word("prefill", "pattern", "streaming", "sink_recent")

    def __post_init__(self) -> None:
        if isinstance(self.retrieval, TableUse):
            check_word(self.retrieval.table, self.tables, "retrieval.table")
        if not self.streaming.store_rule:
            raise ConfigError(
                f"streaming: got pattern {spec_word(self.streaming)!r}, but streaming heads read a prompt by the rule "
                "of their store, and nothing applies another pattern to them yet. What works: pattern 'sink_recent'."
            )

    @property
    def table(self) -> PrefillTable | None:
        """The table in use, if any."""
        return self.tables[self.retrieval.table] if isinstance(self.retrieval, TableUse) else None


@dataclass(frozen=True)
class DecodeSection:
    """Which cached keys a decoded token reads.

    Attributes:
        retrieval: the selection of the heads that need the whole context.
    """

    retrieval: Any = word("decode", "select", "retrieval", "dense")

    def __post_init__(self) -> None:
        if not self.retrieval.reads_all and not hasattr(self.retrieval, "choose"):
            raise ConfigError(
                f"retrieval: got select {spec_word(self.retrieval)!r}, whose class says neither that it reads every "
                "token (reads_all) nor what to read. Make it a subclass of hf_longctx.decode.base.Select. What works: "
                "select 'dense'."
            )


def check_counts(data: Mapping[str, Any]) -> None:
    """Raise ConfigError where a map of plain ``data`` has not the layers and heads of its model section.

    Only counts: no entry is looked at, so that a map of a million entries is refused at once. What is no list, and
    a model section that says no counts, is left to the conversion of the sections.
    """
    model = _part(data, "model")
    heads = _part(data, "heads")
    tables = _part(_part(data, "prefill"), "tables")
    layers, queries, width = (
        model.get(key) for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    )
    if not all(type(count) is int and 0 < count <= MOST_HEADS for count in (layers, queries, width)) or queries % width:
        return
    maps = {"heads": heads} | {f"heads.alternatives.{k}": one for k, one in _part(heads, "alternatives").items()}
    found = [(f"{path}.scores", one, "scores", width, "KV heads") for path, one in maps.items()]
    found += [(f"prefill.tables.{name}.map", one, "map", queries, "query heads") for name, one in tables.items()]
    for where, one, key, columns, unit in found:
        rows = one.get(key) if isinstance(one, Mapping) else None
        if isinstance(rows, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in rows[: layers + 1]):
            check_rows(rows, layers, columns, where, unit)


def _part(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = data.get(key)
    return part if isinstance(part, Mapping) else {}


def check_rows(rows: Sequence, layers: int, width: int, where: str, unit: str) -> None:
    """Raise ConfigError unless ``rows`` is ``[layers][width]``."""
    if len(rows) != layers:
        raise ConfigError(f"{where}: got {len(rows)} rows, expected {layers}, one per layer.")
    for i, row in enumerate(rows):
        if len(row) != width:
            raise ConfigError(f"{where}[{i}]: got {len(row)} entries, expected {width} {unit}.")
