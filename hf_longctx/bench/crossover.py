"""``bench crossover``: from which prompt length on a patched model's sparse prefill beats its dense one, here."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import yaml
from torch import Tensor

from ..cache.plan import FEWEST
from ..config.config import LongCtxConfig
from ..config.find import load_named
from ..errors import ConfigError
from ..prefill.base import select
from ..prefill.dense import Dense
from .block_lists import list_answer
from .columns import Column, check_same, dtype_of, kept_buffers, random_heads
from .measure import Samples, Told, quiet, turns
from .patterns import choosers, local_heads, parse
from .prefill import QKV, WARM, attend, check_kernel, spread
from .settings import Settings

DENSE = "dense"
SPARSE = "sparse"
PATTERN = "vertical_slash"  # where neither a pattern nor a config is given
CLEAR = 1.5  # times faster in the worst round, after a length that won already: longer prompts need no measuring


@dataclass(frozen=True)
class CrossoverCase:
    """Whose retrieval heads are measured.

    Attributes:
        settings: their shape, as one layer of retrieval heads, and how to measure.
        prefill: the section of that layer.
        config: the shipped name or path it comes from, if any.
        given: the sections that an override needs besides ``min_tokens``: what is not in ``config``.
    """

    settings: Settings
    prefill: dict
    config: str | None = None
    given: dict = field(default_factory=dict)


def case_of(
    settings: Settings,
    config: str | None = None,
    pattern: str | None = None,
    table: str | None = None,
    kernel: str | None = None,
) -> CrossoverCase:
    """What to measure: the heads of ``settings`` or of a config, with its patterns or those given.

    Args:
        settings: how to measure; without a config also the shape: half of its KV heads, as retrieval heads.
        config: what ``load_named`` takes: shape, roles and prefill section come from there.
        pattern: ``WORD:field=value:...`` for all heads; without it the config's own, or ``PATTERN``.
        table: the name of one of the config's tables.
        kernel: the kernel word; without it the config's own.

    Raises:
        ConfigError: no such config, pattern or table, both a pattern and a table, or nothing sparse to measure.
    """
    if min(settings.tokens) < FEWEST:
        raise ConfigError(f"tokens: patterns run for at least {FEWEST} tokens, given {min(settings.tokens)}.")
    own = None if config is None else load_named(config)
    if kernel == ("auto" if own is None else own.kernel):
        kernel = None  # nothing to override
    given = _given(config, pattern, table, kernel)
    settings = replace(settings, layers=1, patterns=(), densities=())
    if own is None:
        kv_heads = max(1, settings.kv_heads // 2)
        heads = kv_heads * (settings.heads // settings.kv_heads)
        one = replace(settings, heads=heads, kv_heads=kv_heads, kernel=kernel or "auto")
        return CrossoverCase(one, {"min_tokens": 0, **given["prefill"]}, None, given)
    found = own.override(**given)
    kv_heads, prefill = _drawn(found, settings.seed, config)
    heads = kv_heads * (found.model.num_attention_heads // found.model.num_key_value_heads)
    one = replace(settings, heads=heads, kv_heads=kv_heads, head_dim=found.model.head_dim, kernel=found.kernel)
    return CrossoverCase(one, prefill, config, given)


def _given(config: str | None, pattern: str | None, table: str | None, kernel: str | None) -> dict:
    """The sections that these arguments lay over the config."""
    if pattern is not None and table is not None:
        raise ConfigError(f"give a pattern or a table, not both; given {pattern!r} and {table!r}.")
    if table is not None and config is None:
        raise ConfigError(f"table {table!r}: a table is a part of a config; give the config too.")
    if config is None and pattern is None:
        pattern = PATTERN
    given = {} if kernel is None else {"kernel": kernel}
    if pattern is not None:
        choosers((pattern,))
        given["prefill"] = {"retrieval": parse(pattern, "pattern")}
    elif table is not None:
        given["prefill"] = {"retrieval": {"table": table}}
    return given


def _drawn(config: LongCtxConfig, seed: int, name: str) -> tuple[int, dict]:
    """(KV heads, prefill section) of a layer of as many retrieval KV heads as a layer of the model has on average.

    Drawn from all layers, because a table's patterns differ from layer to layer.
    """
    places = [(i, j) for i, row in enumerate(config.roles()) for j, letter in enumerate(row) if letter == "R"]
    section = config.to_dict()["prefill"]
    table = config.prefill.table
    if not places:
        raise ConfigError(f"{name}: every KV head is streaming, so no head reads a prompt by a pattern.")
    count = max(1, round(len(places) / config.model.num_hidden_layers))
    section |= {"min_tokens": 0, "tables": {}}
    if table is not None:
        group = config.model.num_attention_heads // config.model.num_key_value_heads
        drawn = sorted(random.Random(seed).sample(places, count))
        row = [table.map[i][j * group + query] for i, j in drawn for query in range(group)]
        budgets = config.to_dict()["prefill"]["tables"][config.prefill.retrieval.table]["budgets"]
        section["tables"] = {config.prefill.retrieval.table: {"budgets": budgets, "map": [row]}}
        sparse = any(not table.budgets[index].reads_all for index in row)
    else:
        sparse = not config.prefill.retrieval.reads_all
    if not sparse:
        known = ", ".join(config.prefill.tables) or "none"
        raise ConfigError(f"{name}: its retrieval heads read densely; give a pattern or a table (its tables: {known}).")
    return count, section


@torch.no_grad()
def run(case: CrossoverCase, told: Told = quiet) -> list[dict]:
    """One result per dtype and length, as `until_clear`."""
    return until_clear(case.settings, lambda word, tokens: _measured(case, word, tokens, told))


def until_clear(settings: Settings, measured: Callable[[str, int], dict]) -> list[dict]:
    """``measured(dtype, tokens)`` of each dtype, shortest first, until it is clear that longer lengths win as well."""
    results = []
    for word in settings.dtypes:
        found: list[dict] = []
        for tokens in sorted(set(settings.tokens)):
            found.append(measured(word, tokens))
            if is_clear(found):
                break
        results += found
    return results


def _measured(case: CrossoverCase, word: str, tokens: int, told: Told) -> dict:
    settings = case.settings
    dtype = dtype_of(word)
    roles = settings.all_heads("R")
    prefills = {DENSE: None, SPARSE: case.prefill}
    columns = {name: Column.of(settings, dtype, roles, prefill) for name, prefill in prefills.items()}
    torch.manual_seed(settings.seed)
    error = check_kernel(settings, word, min(tokens, WARM))  # before anything is timed
    q, k = (local_heads(n, tokens, settings, dtype) for n in (settings.heads, settings.kv_heads))
    qkv = (q, k, random_heads(settings.kv_heads, tokens, settings, dtype))
    short = tuple(x[:, :, :WARM] for x in qkv)
    for name, column in columns.items():
        error = max(error, _check(column, name, short, attend(column, short, Samples(), Samples()), word))
    times = {name: Samples() for name in columns}
    for number, name in turns(columns, settings.rounds, tokens, told):
        out = attend(columns[name], qkv, times[name], Samples())
        if number == 0:
            error = max(error, _check(columns[name], name, qkv, out, word))
    density = columns[SPARSE].forward.log.prefill.density
    return {"dtype": word, "tokens": tokens, **compared(settings, columns, times, density, error)}


def compared(
    settings: Settings, columns: dict[str, Column], times: dict[str, Samples], density: float, error: float
) -> dict:
    """What a result says of two columns, `DENSE` and `SPARSE`, and which of them wins."""
    middle, worst = gain(times[DENSE].ms, times[SPARSE].ms)
    figures = {name: {"ms": times[name].as_dict(), "kernel": column.kernel} for name, column in columns.items()}
    figures[SPARSE]["density"] = density
    facts = {"heads": settings.heads, "kv_heads": settings.kv_heads, "error": error}
    return {**facts, "columns": figures, "faster": middle, "faster_in_worst": worst, "wins": worst > 1}


def _check(column: Column, name: str, qkv: QKV, out: Tensor, word: str) -> float:
    """The error of ``out [1, T, H, D]`` at some queries, against the mask of the lists that its patterns choose."""
    q, k, v = qkv
    at = spread(q.shape[2])
    module = column.model.model.layers[0].self_attn
    plan = module.longctx_plan.role("retrieval").prefill
    k, v = kept_buffers(
        column.update(0, k, v)
    )  # in the memory layout in which the patterns saw them: scores round alike
    column.forget()
    blocks = select(plan.patterns if plan else (Dense(),) * q.shape[1], q, k, module.scaling)
    if plan and plan.share_groups:
        blocks = blocks.share_groups(q.shape[1] // k.shape[1])
    return check_same(f"the {name} output", out[:, at], list_answer(q[:, :, at], k, v, at, blocks), word)


def gain(dense: list[float], sparse: list[float]) -> tuple[float, float]:
    """How many times faster sparse is than dense: in the middle round, and in the worst.

    Rounds are compared with themselves. Of 10 rounds or more the worst tenth is left out.
    """
    ratios = Samples([a / b for a, b in zip(dense, sparse, strict=True)])
    return ratios.median, ratios.spread[0]


def first_win(measured: Iterable[tuple[int, bool]]) -> int | None:
    """The shortest length that wins and after which every longer one does; of (tokens, wins) in any order."""
    found = None
    for tokens, wins in sorted(measured, reverse=True):
        if not wins:
            break
        found = tokens
    return found


def is_clear(results: list[dict]) -> bool:
    """Whether the last two lengths won, the longer one by ``CLEAR`` in its worst round."""
    return len(results) > 1 and results[-2]["wins"] and results[-1]["faster_in_worst"] >= CLEAR


def override(case: CrossoverCase, min_tokens: int) -> dict[str, str]:
    """The override of ``prefill``, as a user would write it in Python and in a YAML."""
    sections = {**case.given, "prefill": {"min_tokens": min_tokens, **case.given.get("prefill", {})}}
    return written(sections, case.config)


def written(sections: dict, config: str | None = None) -> dict[str, str]:
    """Sections laid over a config, as a user would write them in Python and in a YAML."""
    arguments = ["model", *([] if config is None else [repr(config)])]
    arguments += [f"{name}={value!r}" for name, value in sections.items()]
    call = f"patch_model({', '.join(arguments)})"
    return {"python": call, "yaml": yaml.safe_dump(sections, sort_keys=False, default_flow_style=None, width=110)}


def verdicts(results: list[dict], override: Callable[[int], dict[str, str]]) -> dict[str, dict]:
    """By dtype: ``min_tokens`` and how to write it, or None where sparse never won."""
    found = {}
    for word in dict.fromkeys(result["dtype"] for result in results):
        mine = [result for result in results if result["dtype"] == word]
        tokens = first_win((result["tokens"], result["wins"]) for result in mine)
        lengths = [result["tokens"] for result in mine]
        found[word] = {"min_tokens": tokens, "shortest": min(lengths), "longest": max(lengths)}
        if tokens is not None:
            found[word] |= override(tokens)
    return found


def facts(case: CrossoverCase, results: list[dict]) -> dict:
    """What the JSON holds besides every time: what was measured, and the verdicts."""
    what = {"config": case.config, "prefill": case.prefill}
    return {"subject": what, "crossover": verdicts(results, partial(override, case))}
