"""``LongCtxConfig.plan``: the best config of a model for so many tokens in so much memory; the first rung that fits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from ..config.config import LongCtxConfig
from ..errors import ConfigError, LongCtxError
from ..io.console import count
from .decoded import Decoded, decoded
from .find import find, loaded
from .ladder import RULE, Overrides, Rung, ladder, offloaded
from .memory import DENSE, PATCHED, RESERVED, UNKNOWN_LENGTH, MemoryModel, MemorySettings, Need, longest
from .sizes import parse_bytes, word_of

SMALL_CHUNK = 512  # tokens: what a refusal offers
SIZES = 11, 8, 12, 10  # columns of a rung's numbers: its line has room in 80


@dataclass(frozen=True, repr=False)
class Plan:
    """What was chosen, and why; ``str(plan)`` says it in words.

    Attributes:
        name: of the model.
        settings: the memory and what it was counted with.
        reserve: the cache is a ``LongCtxCache`` made with ``max_tokens``.
        config: the config of the last rung, for ``patch_model`` and ``to_yaml``.
        rungs: what was tried, in order; the last one is the first that fits.
        dense: what the model needs without a patch.
        reserved: what the last rung needs with a cache made with ``max_tokens``.
        notes: what is known of the quality, and what is not known.
        decoded: what its selection reads; None where decoded tokens read every cached one.
        ends: when tokens leave the cache, in words, where some do.
    """

    name: str
    settings: MemorySettings
    reserve: bool
    config: LongCtxConfig
    rungs: tuple[Rung, ...]
    dense: Need
    reserved: Need
    notes: tuple[str, ...]
    decoded: Decoded | None = None
    ends: str = ""

    @property
    def context(self) -> int:
        """Tokens of a row, prompt and answer together."""
        return self.dense.tokens

    @property
    def overrides(self) -> Overrides:
        """What is changed of the model's own config; ``patch_model(model, **plan.overrides)`` does it."""
        return self.rungs[-1].overrides

    @property
    def need(self) -> Need:
        return self.rungs[-1].need

    @property
    def dense_fits(self) -> bool:
        return self.dense.total <= self.settings.memory

    @property
    def _unit(self) -> tuple[str, int]:
        return _unit(self.settings.memory)

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold; the config is not in it (``config.to_dict``)."""
        rungs = [{"label": r.label, "overrides": r.overrides, "need": r.need.as_dict()} for r in self.rungs]
        return {
            "model": self.name,
            "context": self.context,
            "settings": self.settings.as_dict(),
            "reserve": self.reserve,
            "rungs": rungs,
            "overrides": self.overrides,
            "dense": self.dense.as_dict(),
            "reserved": self.reserved.as_dict(),
            "notes": list(self.notes),
            "decode": None if self.decoded is None else self.decoded.as_dict(),
        }

    def __str__(self) -> str:
        s = self.settings
        read = (
            f"read in chunks of {s.chunk} tokens (prefill_chunk_size={s.chunk})" if s.chunk else "read in one forward"
        )
        cache = f"LongCtxCache(model, max_tokens={self.context})"
        made = cache if self.reserve else "generate()"
        sequences = count(s.batch, "sequence")
        changes = _flow(self.overrides) if self.overrides else "the config as it is"
        lines = [
            f"plan      {self.context} tokens of {self.name} in {_size(s.memory)}: {s.dtype}, {sequences} of "
            f"prompt and answer together, the prompt {read}, the cache as {made} makes it. GB are 10^9 bytes.",
            _row("rung", *(f"{part} {self._unit[0]}" for part in ("weights", "KV", "working", "total"))),
            *(self._line(rung.label, rung.need) for rung in self.rungs),
            self._line("dense", self.dense),
            f"chosen    {changes}",
        ]
        if self.need.kv_left < self.need.kv:
            left = self.need.kv_left
            lines.append(
                f"evicted   KV is counted while the prompt is read. {self.ends} the cache takes {_size(left)}, "
                f"and all of it {_size(self.need.weights + left)} beside what a decoded token needs"
            )
        if self.decoded is not None:
            lines.append(f"decode    {self.decoded}")
        if self.dense_fits:
            lines.append("dense     fits: there is no need to patch")
        if not self.reserve:
            total = _size(self.reserved.total)
            lines.append(
                f"reserve   with {cache}, which never grows, it needs {total}; the rule can count so (reserve)"
            )
        return "\n".join([*lines, f"rule      {RULE}", *(f"note      {note}" for note in self.notes)])

    __repr__ = __str__  # what a notebook shows

    def _line(self, label: str, need: Need) -> str:
        numbers = (f"{part / self._unit[1]:.2f}" for part in (need.weights, need.kv, need.working, need.total))
        over = (need.total - self.settings.memory) / self._unit[1]
        return _row(label, *numbers) + (f"  {over:.2f} over" if over > 0 else "  fits")


def plan(
    model: Any,
    *,
    context: int,
    memory: int | str,
    dtype: str | None = None,
    batch: int = 1,
    chunk: int = 4096,
    weights: int | str | None = None,
    config: str | os.PathLike | Mapping[str, Any] | LongCtxConfig | None = None,
    reserve: bool = False,
) -> Plan:
    """The first rung of the ladder that fits; see ``LongCtxConfig.plan``.

    Raises:
        LongCtxError: not even the last rung fits.
        ConfigError: an argument out of bounds, no such model, or no config for it.
        UnsupportedModelError: its family cannot be patched.
        UnsupportedModeError: as ``patch_model`` with the chosen config.
    """
    if type(context) is not int or context < 1:
        raise ConfigError(f"context: got {context!r}, expected a whole number of tokens, at least 1.")
    named = isinstance(model, (str, os.PathLike))
    word = dtype or ("bf16" if named else word_of(model.dtype))
    size = None if weights is None else parse_bytes(weights, "weights")
    settings = MemorySettings(parse_bytes(memory, "memory"), word, batch, chunk, size)
    memory_model = find(str(model), settings, config) if named else loaded(model, settings, config)
    way = RESERVED if reserve else PATCHED
    tried = []
    for rung, here in ladder(memory_model, way, context):
        tried.append(rung)
        if rung.need.total <= settings.memory:
            if rung.overrides:
                here.patch()  # refuses what a patch would refuse later; find and loaded did it for the first rung
            notes = (*_quality(here.config, rung), *here.notes, *_beyond(here, context))
            dense = here.need(DENSE, context)
            reserved = here.need(RESERVED, context)
            reads = decoded(here.plans, context)
            found = (here.name, here.settings, reserve, here.config, tuple(tried), dense, reserved, notes, reads)
            return Plan(*found, ends=here.ends)
    raise LongCtxError(_refusal(here, way, tried))


def _quality(config: LongCtxConfig, rung: Rung) -> Iterator[str]:
    """What is known of the answers of a config, and what is not."""
    heads = config.heads
    source = heads.active.source
    form = "roles" if heads.active.scores is None else "scores"
    counted = f"{config.retrieval_heads} of {config.kv_heads} KV heads {config.kept}"
    first_map = heads.use is None  # not an alternative, which the measurements are not of
    curve = heads.measured.get("curve") if first_map else None
    rows = [
        row for row in curve or () if isinstance(row, Mapping) and row.get("retrieval_heads") == config.retrieval_heads
    ]
    if config.retrieval_heads == config.kv_heads:
        unmeasured = ": the heads of this model were not measured, and hf-longctx identify measures them"
        yield counted + (unmeasured if first_map and heads.confidence == "none" else "")
    elif rows:
        figures = ", ".join(f"{key} {value}" for key, value in rows[0].items() if key != "retrieval_heads")
        yield f"{counted}; heads.measured has for that: {figures}"
    else:
        origin = f"{source.get('method', form)} of {source.get('from', 'unknown origin')}"
        yield f"{counted}, by {origin}; what that costs was not measured (heads.measured): hf-longctx eval measures it"
    if heads.doubt is not None and config.retrieval_heads < config.kv_heads:
        yield heads.doubt
    if "evicted" in config.kept:
        yield "what the eviction costs was not measured: hf-longctx eval --sweep budget=... measures it"
    if "stores" in rung.overrides:
        yield f"what these stores cost was not measured on this model: {_flow(rung.overrides['stores'])}"


def _beyond(memory_model: MemoryModel, context: int) -> Iterator[str]:
    if memory_model.made_for is None:
        yield UNKNOWN_LENGTH
    elif context > memory_model.made_for:
        yield f"the model was made for {memory_model.made_for} tokens"


def _refusal(last: MemoryModel, way: str, tried: list[Rung]) -> str:
    """What the smallest needs, the longest context that fits, and what to change."""
    s = last.settings
    rung = tried[-1]
    need = rung.need
    tokens = longest(last, way)
    dense = last.need(DENSE, need.tokens).total
    unit, size = _unit(need.total)
    changes = [f"no patch: dense it needs {_size(dense)}"] if dense <= s.memory else []
    changes += [f"memory of at least {math.ceil(100 * need.total / size) / 100:.2f} {unit}"]
    changes += [f"a context of at most {tokens} tokens"] if tokens else []
    changes += ["smaller weights (weights: their size when quantised)"]
    changes += [f"fewer than {count(s.batch, 'sequence')}"] if s.batch > 1 else []
    others = {
        f"chunks of {SMALL_CHUNK} tokens": replace(last, settings=replace(s, chunk=SMALL_CHUNK)).need(way, need.tokens),
        "a cache that never grows (reserve)": last.need(RESERVED, need.tokens),
    }
    if (slower := offloaded(last)) is not None:
        others["older tokens outside of this memory, much slower (store: offloaded)"] = slower.need(way, need.tokens)
    for change, other in others.items():
        fits = " (fits)" if other.total <= s.memory else ""
        changes += [f"{change}: {_size(other.total)}{fits}"] if other.total < need.total else []
    named = "".join(f", heads.use: {name}" for name in last.config.heads.alternatives)
    scored = last.config.heads.active.scores is not None
    changes += ["a smaller heads.retrieval_fraction in a YAML of yours, after hf-longctx eval"] if scored else []
    changes += [] if scored else [f"a head map with scores (hf-longctx identify{named})"]
    short = f" (the weights alone take {_size(need.weights)})" if not tokens else ""
    return (
        f"{need.tokens} tokens of {last.name} do not fit into {_size(s.memory)}; rungs tried: {len(tried)}. The "
        f"smallest ({rung.label}) needs {_size(need.total)}: weights {_size(need.weights)}, KV {_size(need.kv)}, "
        f"working {_size(need.working)}. The longest context with it: {tokens or 'none'}{short}. "
        f"What would help: {'; '.join(changes)}."
    )


def _row(label: str, *numbers: str) -> str:
    return f"  {label:<25}" + "".join(f"{number:>{size}}" for number, size in zip(numbers, SIZES, strict=True))


def _flow(plain: Mapping[str, Any]) -> str:
    """YAML on one line."""
    return yaml.safe_dump(plain, default_flow_style=True, width=10**6, sort_keys=False).strip()


def _unit(size: int) -> tuple[str, int]:
    """The unit to say so many bytes in, and its bytes."""
    return ("GB", 10**9) if size >= 10**9 else ("MB", 10**6)


def _size(size: int) -> str:
    unit, factor = _unit(size)
    return f"{size / factor:.2f} {unit}"
