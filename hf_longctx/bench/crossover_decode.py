"""``bench crossover --decode``: from which length on a selection decodes faster than reading every token, here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import yaml

from .columns import RETRIEVAL, Column, check_same, dtype_of, random_heads
from .crossover import DENSE, SPARSE, first_win, gain, is_clear
from .decode import step, token_of
from .measure import Samples, Told, quiet, turns
from .selections import SelectCase
from .settings import Settings

STEPS = 8  # tokens of a turn, so that choosing and using a choice again are both in it


@dataclass(frozen=True)
class DecodeCase:
    """What is measured: layers of retrieval heads that read everything, or a selection.

    Attributes:
        settings: their shape, and how to measure.
        select: the selection.
    """

    settings: Settings
    select: SelectCase


def case_of(settings: Settings, decode: str) -> DecodeCase:
    """The case of a selection ``WORD:field=value:...``.

    Raises:
        ConfigError: it is none, or reads everything.
    """
    return DecodeCase(replace(settings, patterns=(), densities=(), steps=STEPS), SelectCase.of(decode))


@torch.no_grad()
def run(case: DecodeCase, told: Told = quiet) -> list[dict]:
    """One result per dtype and length, shortest first, until it is clear that longer ones win as well."""
    results = []
    for word in case.settings.dtypes:
        found: list[dict] = []
        for tokens in sorted(set(case.settings.tokens)):
            found.append(_measured(case, word, tokens, told))
            if is_clear(found):
                break
        results += found
    return results


def _measured(case: DecodeCase, word: str, tokens: int, told: Told) -> dict:
    settings = case.settings
    dtype = dtype_of(word)
    roles = settings.all_heads("R")
    selects = {DENSE: None, SPARSE: case.select.fields}
    columns = {name: Column.of(settings, dtype, roles, select=select) for name, select in selects.items()}
    torch.manual_seed(settings.seed)
    kept = []
    for layer in range(settings.layers):
        k, v = (random_heads(settings.kv_heads, tokens, settings, dtype) for _ in "kv")
        kept.append([k, v])
        for column in columns.values():
            column.update(layer, k, v)
    error = _first_token(case, word, columns, kept)
    times = {name: Samples() for name in columns}
    for _, name in turns(columns, settings.rounds, tokens, told):
        several = [token_of(settings, dtype) for _ in range(settings.steps)]
        times[name].time(lambda: [step(columns[name], one) for one in several], settings.layers * settings.steps)  # noqa: B023
    middle, worst = gain(times[DENSE].ms, times[SPARSE].ms)
    figures = {name: {"ms": times[name].as_dict(), "kernel": column.kernel} for name, column in columns.items()}
    share = columns[SPARSE].log.decode.share
    figures[SPARSE]["density"] = 1.0 if share is None else share
    facts = {"heads": settings.heads, "kv_heads": settings.kv_heads, "error": error}
    verdict = {"faster": middle, "faster_in_worst": worst, "wins": worst > 1}
    return {"dtype": word, "tokens": tokens, **facts, "columns": figures, **verdict}


def _first_token(case: DecodeCase, word: str, columns: dict[str, Column], kept: list) -> float:
    """The largest error of a token in the column of the selection, against what it reads by definition."""
    settings = case.settings
    token = token_of(settings, dtype_of(word))
    outs = {name: [] for name in columns}
    for name, column in columns.items():
        step(column, token, outs[name])
    error = 0.0
    for layer, (q, k, v) in enumerate(token):
        whole = [torch.cat(pair, 2) for pair in zip(kept[layer], (k, v), strict=True)]
        want = case.select.answer(q, *whole, q.shape[3] ** -0.5)
        error = max(error, check_same(f"the output of layer {layer}", outs[SPARSE][layer], want, word))
    return error


def facts(case: DecodeCase, results: list[dict]) -> dict:
    """What the JSON holds besides every time: what was measured, and from which length on it wins, by dtype."""
    found = {}
    for word in dict.fromkeys(result["dtype"] for result in results):
        mine = [result for result in results if result["dtype"] == word]
        tokens = first_win((result["tokens"], result["wins"]) for result in mine)
        lengths = [result["tokens"] for result in mine]
        found[word] = {"min_tokens": tokens, "shortest": min(lengths), "longest": max(lengths)}
        if tokens is not None:
            found[word] |= _override(case, tokens)
    return {"subject": {"select": case.select.fields, "instead of": RETRIEVAL}, "crossover": found}


def _override(case: DecodeCase, min_tokens: int) -> dict[str, str]:
    """The override of ``decode``, as a user would write it in Python and in a YAML."""
    fields = {name: value for name, value in case.select.fields.items() if name != "dense_layers"}
    section = {"decode": {"retrieval": {**fields, "min_tokens": min_tokens}}}
    call = f"patch_model(model, decode={section['decode']!r})"
    return {"python": call, "yaml": yaml.safe_dump(section, sort_keys=False, default_flow_style=None, width=110)}
