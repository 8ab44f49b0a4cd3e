"""``bench decode``: attention and cache update of one decoded token, per layer, over caches filled with random K/V."""

from __future__ import annotations

import torch
from torch import Tensor

from .columns import (
    HALF,
    RETRIEVAL,
    STATIC,
    STOCK,
    Column,
    check_same,
    dtype_of,
    kept_buffers,
    random_heads,
    streaming_answer,
)
from .measure import Samples, Told, quiet, turns
from .selections import SelectCase
from .settings import Settings
from .static_cache import StaticColumn, refusal


@torch.no_grad()
def run(settings: Settings, told: Told = quiet) -> list[dict]:
    """One result per dtype and length; ``columns`` holds figures and every raw time."""
    return [_case(settings, word, tokens, told) for word in settings.dtypes for tokens in settings.tokens]


def _case(settings: Settings, word: str, tokens: int, told: Told) -> dict:
    dtype = dtype_of(word)
    roles = {STOCK: None, RETRIEVAL: settings.all_heads("R"), HALF: settings.half_streaming()}
    columns = {name: Column.of(settings, dtype, role) for name, role in roles.items()}
    why = refusal(lambda: _try_static(settings, dtype)) if settings.static else None
    if settings.static and why is None:
        capacity = tokens + 1 + settings.rounds * settings.steps
        static = StaticColumn.of_capacity(settings, dtype, capacity)
        columns = {STOCK: columns[STOCK], STATIC: static, **columns}
    selections = [SelectCase.of(text) for text in settings.select]
    for one in selections:
        columns |= one.columns(settings, dtype, roles[HALF])
    torch.manual_seed(settings.seed)
    for layer in range(settings.layers):
        k, v = (random_heads(settings.kv_heads, tokens, settings, dtype) for _ in "kv")
        for column in columns.values():
            column.update(layer, k, v)
    kept, error = _first_token(settings, columns, roles[HALF], word, selections)
    # Of a selection the tokens of a turn are timed together, so that choosing has its share in each time.
    together = {name: one.together(settings.steps) for one in selections for name, _ in one.names}
    times = {name: Samples() for name in columns}
    sums = {name: Samples() for name in columns}
    for _, name in turns(columns, settings.rounds, tokens, told):
        each = together.get(name, 1)
        for _ in range(1 if name in together else settings.steps):
            some = [token_of(settings, dtype) for _ in range(each)]
            work = lambda: [step(columns[name], token) for token in some][-1]  # noqa: B023, E731
            kept[name] = times[name].time(work, settings.layers * each)
        for _ in range(settings.steps):
            sums[name].time(lambda: _read(kept[name]), settings.layers)  # noqa: B023
    figures = {
        name: {"kernel": column.kernel, **_figures(settings, kept[name], times[name], sums[name])}
        for name, column in columns.items()
    }
    for one in selections:
        for name, whole in one.names:
            counts = columns[name].forward.log.decode
            figures[name] |= {"instead_of": whole, "read": counts.share, "reused": counts.reused}
            for speed in ("gb_per_s", "sum_gb_per_s", "share_of_sum"):  # of reading all that is kept
                del figures[name][speed]
    facts = {"roles": roles[HALF], "error": error, "not_measured": {STATIC: why} if why else {}}
    return {"dtype": word, "tokens": tokens, **facts, "columns": figures}


def _try_static(settings: Settings, dtype: torch.dtype) -> None:
    """One token through every layer of a ``StaticCache`` for two."""
    step(StaticColumn.of_capacity(settings, dtype, 2), token_of(settings, dtype))


def token_of(settings: Settings, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Random q, k, v of one token for every layer."""
    counts = (settings.heads, settings.kv_heads, settings.kv_heads)
    return [tuple(random_heads(n, 1, settings, dtype) for n in counts) for _ in range(settings.layers)]


def step(column: Column, token: list[tuple[Tensor, Tensor, Tensor]], outs: list[Tensor] | None = None) -> list:
    """One token through all layers, one after the other, so that no layer finds its keys in the processor's cache."""
    kept = []
    for layer, (q, k, v) in enumerate(token):
        kept.append(column.update(layer, k, v))
        out = column.attend(layer, q, kept[-1])
        if outs is not None:
            outs.append(out)
    return kept


def _read(kept: list) -> None:
    """The speed of light: sum all that the attention of every layer read."""
    for layer in kept:
        for part in kept_buffers(layer):
            # Head by head where there is spare room between them: torch sums strided bfloat16 30 times slower.
            for run in [part] if part.is_contiguous() else part[0]:
                run.sum()


def _first_token(
    settings: Settings, columns: dict[str, Column], half: list[str], word: str, selections: list[SelectCase]
) -> tuple[dict, float]:
    """Decode one token in every column, and check that all of them give the right answer."""
    token = token_of(settings, dtype_of(word))
    outs = {name: [] for name in columns}
    kept = {}
    for name, column in columns.items():
        kept[name] = step(column, token, outs[name])
    error = 0.0
    group = settings.heads // settings.kv_heads
    for layer, (q, _, _) in enumerate(token):
        k, v = kept[STOCK][layer]
        last = torch.tensor([k.shape[2] - 1])
        streams = torch.tensor([letter == "S" for letter in half[layer]]).repeat_interleave(group)[:, None]
        streamed = streaming_answer(q, k, v, last, settings)
        want = torch.where(streams, streamed, outs[STOCK][layer].float())
        where = f"the output of layer {layer}"
        error = max(
            error,
            check_same(f"{where}, {RETRIEVAL},", outs[RETRIEVAL][layer], outs[STOCK][layer], word),
            check_same(f"{where}, {HALF},", outs[HALF][layer], want, word),
        )
        for one in selections:
            selected, some = (one.answer(q, k, v, q.shape[3] ** -0.5, row) for row in (None, half[layer]))
            wanted = (selected, torch.where(streams, streamed, some))
            for (name, _), right in zip(one.names, wanted, strict=True):
                error = max(error, check_same(f"{where}, {name},", outs[name][layer], right, word))
        if STATIC in outs:
            error = max(error, check_same(f"{where}, {STATIC},", outs[STATIC][layer], outs[STOCK][layer], word))
    return kept, error


def _figures(settings: Settings, kept: list, times: Samples, sums: Samples) -> dict:
    """Speed of reading what is kept, absolute and as a share of the speed of summing it.

    Of the sums the fastest counts: it is a bound, and whatever slows a sum down would flatter the share.
    """
    best = min(sums.ms)
    read = sum(part.numel() * part.element_size() for layer in kept for part in kept_buffers(layer)) / settings.layers
    return {
        "ms_per_layer": times.as_dict(),
        "sum_ms_per_layer": sums.as_dict(),
        "kept_bytes_per_layer": round(read),
        "gb_per_s": read / times.median / 1e6,
        "sum_gb_per_s": read / best / 1e6,
        "share_of_sum": best / times.median,
    }
