"""``bench prefill``: attention of some heads of one layer over a prompt: dense, streaming, and by block lists.

And what comes before a block list: the time in which a pattern chooses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .block_lists import ListColumn, list_answer, name_of
from .columns import RETRIEVAL, STOCK, STREAMING, Column, check_same, dtype_of, random_heads, streaming_answer
from .measure import Samples, Told, quiet, turns
from .patterns import Chooser, choosers, local_heads
from .settings import Settings

WARM = 1024  # tokens of the first, untimed prompt
CHECKED = 64  # queries, spread over the prompt, whose answer is checked

QKV = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def run(settings: Settings, told: Told = quiet) -> list[dict]:
    """One result per dtype and length. Only the half of the KV heads that would be streaming is computed."""
    streaming = settings.half_streaming()[0].count("S")
    group = settings.heads // settings.kv_heads
    half = replace(settings, layers=1, heads=streaming * group, kv_heads=streaming)
    patterns = {one.name: one for one in choosers(settings.patterns)}
    return [_case(half, word, tokens, patterns, told) for word in settings.dtypes for tokens in settings.tokens]


def _case(settings: Settings, word: str, tokens: int, patterns: Mapping[str, Chooser], told: Told) -> dict:
    dtype = dtype_of(word)
    roles = {STOCK: None, RETRIEVAL: settings.all_heads("R"), STREAMING: settings.all_heads("S")}
    columns = {name: Column.of(settings, dtype, role) for name, role in roles.items()}
    lengths = (tokens, min(tokens, WARM))
    for density in settings.densities:
        columns[name_of(density)] = ListColumn.of_density(settings, dtype, density, lengths)
    torch.manual_seed(settings.seed)
    qkv = tuple(random_heads(n, tokens, settings, dtype) for n in (settings.heads, *[settings.kv_heads] * 2))
    local = tuple(local_heads(n, tokens, settings, dtype) for n in (settings.heads, settings.kv_heads))
    short = tuple(x[:, :, :WARM] for x in qkv)
    outs = {name: attend(column, short, Samples(), Samples()) for name, column in columns.items()}
    _check(settings, word, short, columns, outs)  # before minutes are spent, and to warm up
    for pattern in patterns.values():
        pattern.choose(*local)
    times, updates, outs = ({name: Samples() for name in (*columns, *patterns)} for _ in range(3))
    densities = {}
    for number, name in turns({**columns, **patterns}, settings.rounds, tokens, told):
        if name in patterns:
            densities[name] = times[name].time(lambda: patterns[name].choose(*local)).density  # noqa: B023
            continue
        out = attend(columns[name], qkv, times[name], updates[name])
        outs[name] = out if number == 0 else None
        if number == 0 and all(isinstance(outs[name], Tensor) for name in columns):
            error = _check(settings, word, qkv, columns, outs)
    figures = {name: _figures(column, times[name], updates[name], tokens) for name, column in columns.items()}
    chosen = {
        name: {
            "ms": times[name].as_dict(),
            "share_of_stock": times[name].median / times[STOCK].median,
            "density": densities[name],
        }
        for name in patterns
    }
    heads = {"heads": settings.heads, "kv_heads": settings.kv_heads}
    return {"dtype": word, "tokens": tokens, **heads, "error": error, "columns": figures, "patterns": chosen}


def attend(column: Column, qkv: QKV, times: Samples, updates: Samples) -> Tensor:
    """Update an empty cache and attend, timed apart: ``[B, T, H, D]``."""
    q, k, v = qkv
    column.forget()
    kept = updates.time(lambda: column.update(0, k, v))
    out = times.time(lambda: column.attend(0, q, kept))
    column.forget()
    return out


def spread(tokens: int) -> Tensor:
    """The positions of the queries whose answer is checked."""
    return torch.linspace(0, tokens - 1, min(CHECKED, tokens)).long()


def check_lists(column: ListColumn, qkv: QKV, name: str, out: Tensor, word: str) -> float:
    """The error of a column's output at ``CHECKED`` queries, against the mask of its list; too large a one raises."""
    q, k, v = qkv
    at = spread(q.shape[2])
    answer = list_answer(q[:, :, at], k, v, at, column.lists[q.shape[2]])
    return check_same(f"the output of {name}", out[:, at], answer, word)


def check_kernel(settings: Settings, word: str, tokens: int, density: int = 50) -> float:
    """The error of the kernel's block lists, for random heads and random lists of ``density`` percent."""
    dtype = dtype_of(word)
    column = ListColumn.of_density(settings, dtype, density, (tokens,))
    qkv = tuple(random_heads(n, tokens, settings, dtype) for n in (settings.heads, *[settings.kv_heads] * 2))
    out = attend(column, qkv, Samples(), Samples())
    return check_lists(column, qkv, f"kernel {column.kernel} for block lists", out, word)


def _figures(column: Column, times: Samples, updates: Samples, tokens: int) -> dict:
    figures = {"ms": times.as_dict(), "update_ms": updates.as_dict(), "kernel": column.kernel}
    return figures | ({"density": column.lists[tokens].density} if isinstance(column, ListColumn) else {})


def _check(settings: Settings, word: str, qkv: QKV, columns: dict[str, Column], outs: dict[str, Tensor]) -> float:
    """All retrieval equals stock; streaming equals its rule, and a list its mask, at ``CHECKED`` queries."""
    q, k, v = qkv
    at = spread(q.shape[2])
    answer = streaming_answer(q[:, :, at], k, v, at, settings)
    return max(
        check_same(f"the output of {RETRIEVAL}", outs[RETRIEVAL], outs[STOCK], word),
        check_same(f"the output of {STREAMING}", outs[STREAMING][:, at], answer, word),
        *(
            check_lists(column, qkv, name, outs[name], word)
            for name, column in columns.items()
            if isinstance(column, ListColumn)
        ),
    )
