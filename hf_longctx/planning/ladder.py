"""The configs that ``plan`` tries: the best one first, then less and less memory, by what should be lost the least.

A rung keeps what the rungs before it changed; all of it is a dict of ordinary overrides. The order of the steps
(``LADDER``) is a judgement, not a measurement: KIVI, arXiv:2402.02750, reports almost the same quality with 2 bits, so
fewer bits come before fewer heads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..config.config import LongCtxConfig
from ..config.files import merge
from ..config.head_map import usable_fraction
from ..config.words import words
from ..errors import ConfigError
from .memory import MemoryModel, Need

logger = logging.getLogger(__name__)

Overrides = dict[str, Any]

BITS = (8, 4)  # of quantised numbers
# a config's share of retrieval heads falls by eighths, down to four of them
SHARES = 8
TARGETS = ("target_drop", "target_nll")  # of identify
FEWEST_SHARES = 4
FEWEST_RECENT = 64  # tokens of a streaming head's window, which is halved down to this
RULE = (
    "quality first: the first rung that fits, each with what the rungs before it changed; one that saves nothing is "
    f"left out. The config as it is; retrieval heads quantised to {BITS[0]}, then {BITS[1]} bits; fewer retrieval "
    f"heads, by eighths of the config's share down to {FEWEST_SHARES} of {SHARES}, never below the share found for a "
    "target, nor by a cut among heads nobody told apart; the window (recent) of streaming heads halved, down to "
    f"{FEWEST_RECENT} tokens."
)


@dataclass(frozen=True)
class Rung:
    """A config that was tried.

    Attributes:
        label: what it changes beside what the rungs before it changed.
        overrides: all its changes, as ``LongCtxConfig.override`` takes them.
        need: what it needs.
    """

    label: str
    overrides: Overrides
    need: Need


def ladder(memory_model: MemoryModel, way: str, tokens: int) -> Iterator[tuple[Rung, MemoryModel]]:
    """The rungs for ``tokens`` tokens with what each is about; each needs less than the one before."""
    need = memory_model.need(way, tokens)
    yield Rung("the config as it is", {}, need), memory_model
    sofar: Overrides = {}
    for step in LADDER:
        for change in step(memory_model.config):
            overrides = merge(sofar or _pinned(memory_model.config), change)
            try:
                lower = replace(memory_model, config=memory_model.config.override(**overrides))
            except ConfigError as error:  # a cut among heads nobody told apart, which only balance and the like bring
                logger.info("plan: %s left out: %s", ", ".join(_leaves(change)), error)
                continue
            if lower.need(way, tokens).total < need.total:
                sofar = overrides
                need = lower.need(way, tokens)
                yield Rung(", ".join(_leaves(change)), overrides, need), lower


def quantised(config: LongCtxConfig) -> Iterator[Overrides]:
    """Retrieval heads by codes of fewer bits, where they keep every token as it is or by codes of more bits."""
    store = config.to_dict()["stores"]["retrieval"]
    if "quantized" in words("stores") and store["store"] in ("full", "quantized"):
        for bits in BITS:
            if bits < store.get("bits", BITS[0] + 1):
                yield {"stores": {"retrieval": {"store": "quantized", "bits": bits}}}


def fewer_heads(config: LongCtxConfig) -> Iterator[Overrides]:
    """Fewer retrieval heads, where scores say which; a share that was found for a target is the floor."""
    heads = config.heads
    found = any(heads.measured.get(target) is not None for target in TARGETS)
    if heads.active.scores is None or (heads.use is None and found):
        return
    own = _share(config)
    for part in range(SHARES - 1, FEWEST_SHARES - 1, -1):
        share = usable_fraction(config.scores, round(own * part / SHARES, 6), heads.confidence)
        if share >= own * FEWEST_SHARES / SHARES:
            yield {"heads": {"retrieval_fraction": share}}


def smaller_windows(config: LongCtxConfig) -> Iterator[Overrides]:
    """Half of the window of streaming heads, again and again; a window that is no number of tokens is left alone."""
    recent = getattr(config.stores.streaming, "recent", None)
    while type(recent) is int and recent > FEWEST_RECENT:
        recent = max(recent // 2, FEWEST_RECENT)
        yield {"stores": {"streaming": {"recent": recent}}}


LADDER: tuple[Callable[[LongCtxConfig], Iterator[Overrides]], ...] = (quantised, fewer_heads, smaller_windows)


def offloaded(memory_model: MemoryModel) -> MemoryModel | None:
    """The model with its older tokens in host memory; None where its store is another than those of the ladder.

    No rung of the ladder: it is slow, and where the model runs on a CPU it is the same memory.
    """
    config = memory_model.config
    store = memory_model.config.to_dict()["stores"]["retrieval"]["store"]
    if config.heads.kv_budget is not None or store not in ("full", "quantized"):
        return None
    return replace(memory_model, config=config.override(stores={"retrieval": {"store": "offloaded"}}))


def _pinned(config: LongCtxConfig) -> Overrides:
    """Its own share instead of a ``kv_budget``, which would turn memory that a rung saves into more heads."""
    return {} if config.heads.kv_budget is None else {"heads": {"retrieval_fraction": _share(config)}}


def _share(config: LongCtxConfig) -> float:
    return round(config.retrieval_heads / config.kv_heads, 6)


def _leaves(overrides: Mapping[str, Any]) -> Iterator[str]:
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield f"{key} {value}"
