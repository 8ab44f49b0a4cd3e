"""``bench crossover --decode``: from which length on a selection decodes faster than reading every token, here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from .columns import RETRIEVAL, Column, check_same, dtype_of, random_heads
from .crossover import DENSE, SPARSE, compared, until_clear, verdicts, written
from .decode import step, token_of
from .measure import Samples, Told, quiet, turns
from .selections import SelectCase
from .settings import Settings

STEPS = 8  # tokens of a turn, at least


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
    select = SelectCase.of(decode)
    return DecodeCase(replace(settings, patterns=(), densities=(), steps=select.together(STEPS)), select)


@torch.no_grad()
def run(case: DecodeCase, told: Told = quiet) -> list[dict]:
    """One result per dtype and length, as `until_clear`."""
    return until_clear(case.settings, lambda word, tokens: _measured(case, word, tokens, told))


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
    share = columns[SPARSE].log.decode.share
    density = 1.0 if share is None else share
    return {"dtype": word, "tokens": tokens, **compared(settings, columns, times, density, error)}


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
    what = {"select": case.select.fields, "instead of": RETRIEVAL}
    return {"subject": what, "crossover": verdicts(results, partial(_override, case))}


def _override(case: DecodeCase, min_tokens: int) -> dict[str, str]:
    """The override of ``decode``, as a user would write it in Python and in a YAML."""
    fields = {name: value for name, value in case.select.fields.items() if name != "dense_layers"}
    return written({"decode": {"retrieval": {**fields, "min_tokens": min_tokens}}})
