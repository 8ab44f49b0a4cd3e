"""``bench prefill``: attention of some heads of one layer over a prompt: dense, streaming, and by block lists."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .block_lists import ListColumn, list_answer, name_of
from .columns import RETRIEVAL, STOCK, STREAMING, Column, check_same, dtype_of, random_heads, streaming_answer
from .measure import Samples, turns
from .settings import Settings

TOKENS = (8192, 32768)
WARM = 1024  # tokens of the first, untimed prompt
CHECKED = 64  # queries, spread over the prompt, whose streaming answer is checked


@torch.no_grad()
def run(settings: Settings) -> list[dict]:
    """One result per dtype and length. Only the half of the KV heads that would be streaming is computed."""
    streaming = settings.half_streaming()[0].count("S")
    group = settings.heads // settings.kv_heads
    half = replace(settings, layers=1, heads=streaming * group, kv_heads=streaming)
    return [_case(half, word, tokens) for word in settings.dtypes for tokens in settings.tokens]


def _case(settings: Settings, word: str, tokens: int) -> dict:
    dtype = dtype_of(word)
    roles = {STOCK: None, RETRIEVAL: settings.all_heads("R"), STREAMING: settings.all_heads("S")}
    columns = {name: Column.of(settings, dtype, role) for name, role in roles.items()}
    lengths = (tokens, min(tokens, WARM))
    for density in settings.densities:
        columns[name_of(density)] = ListColumn.of_density(settings, dtype, density, lengths)
    torch.manual_seed(settings.seed)
    q, k, v = (random_heads(n, tokens, settings, dtype) for n in (settings.heads, *[settings.kv_heads] * 2))
    short = tuple(x[:, :, :WARM] for x in (q, k, v))
    outs = {name: _attend(column, short, Samples(), Samples()) for name, column in columns.items()}
    _check(settings, word, short, columns, outs)  # before minutes are spent, and to warm up
    times, updates, outs = ({name: Samples() for name in columns} for _ in range(3))
    for number, name in turns(columns, settings.rounds):
        out = _attend(columns[name], (q, k, v), times[name], updates[name])
        outs[name] = out if number == 0 else None
        if number == 0 and all(isinstance(done, Tensor) for done in outs.values()):
            error = _check(settings, word, (q, k, v), columns, outs)
    figures = {name: {"ms": times[name].as_dict(), "update_ms": updates[name].as_dict()} for name in columns}
    for density in settings.densities:
        lists = columns[name_of(density)].lists[tokens]
        figures[name_of(density)] |= {"density": lists.density, "kernel": columns[name_of(density)].kernel(q).NAME}
    heads = {"heads": settings.heads, "kv_heads": settings.kv_heads}
    return {"dtype": word, "tokens": tokens, **heads, "error": error, "columns": figures}


def _attend(column: Column, qkv: tuple[Tensor, Tensor, Tensor], times: Samples, updates: Samples) -> Tensor:
    """Update an empty cache and attend, timed apart."""
    q, k, v = qkv
    column.forget()
    kept = updates.time(lambda: column.update(0, k, v))
    out = times.time(lambda: column.attend(0, q, kept))
    column.forget()
    return out


def _check(
    settings: Settings,
    word: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    columns: dict[str, Column],
    outs: dict[str, Tensor],
) -> float:
    """All retrieval equals stock; streaming equals its rule, and a list its mask, at ``CHECKED`` queries."""
    q, k, v = qkv
    at = torch.linspace(0, q.shape[2] - 1, min(CHECKED, q.shape[2])).long()
    want = {STREAMING: streaming_answer(q[:, :, at], k, v, at, settings)}
    for name, column in columns.items():
        if isinstance(column, ListColumn):
            want[name] = list_answer(q[:, :, at], k, v, at, column.lists[q.shape[2]])
    return max(
        check_same(f"the output of {RETRIEVAL}", outs[RETRIEVAL], outs[STOCK], word),
        *(check_same(f"the output of {name}", outs[name][:, at], answer, word) for name, answer in want.items()),
    )
