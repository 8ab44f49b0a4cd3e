"""Scores -> the role of every KV head: a pure function of the config, the same on 1 or N processes.

Roles are one text per layer with one letter per KV head: ``R`` retrieval, ``S`` streaming, ``-`` in a layer whose
heads have none because the model itself does not let them read the whole text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from ..errors import ConfigError
from .bounds import LARGEST

NONE = "-"  # in place of a role


class Unit(NamedTuple):
    """Heads of one layer that get their role together; units sort by score, then layer, then rank in the layer."""

    score: float
    layer: int
    rank: int
    heads: tuple[int, ...]


def assign(
    scores: Sequence[Sequence[float]],
    *,
    fraction: float | None = None,
    kv_budget: float | None = None,
    kv_budget_tokens: int = 32768,
    streaming_tokens: int | Fraction = 320,
    retrieval_tokens: int | Fraction | None = None,
    dense_layers: Sequence[int] = (),
    balance: int = 1,
    granularity: str = "kv_head",
    confidence: str = "measured",
    among: Sequence[int] | None = None,
) -> tuple[str, ...]:
    """Roles of all KV heads, best scores first; of tied scores the lower layer, then the lower head.

    The heads of ``dense_layers`` are retrieval and count towards the share. Under ``balance`` the j-th best heads of a
    layer's slices get their role together, scored by their mean; this keeps the highest sum of scores that a balanced
    choice can have. Under ``granularity="layer"`` so do all heads of a layer. Where heads go together a ``fraction``
    takes the nearest count (halves are rounded up) and a ``kv_budget`` the largest that fits.

    Args:
        scores: ``[layers][KV heads]``, higher = more retrieval.
        fraction: share of all KV heads that are retrieval; 0.0 to 1.0. Fractions of a head are rounded to
            the nearest, halves up.
        kv_budget: share of a dense cache's bytes at ``kv_budget_tokens`` tokens; above 0.0, at most 1.0.
        streaming_tokens: tokens a streaming head caches at most, as many as have its bytes in a dense cache.
        retrieval_tokens: the same of a retrieval head, at ``kv_budget_tokens`` tokens; None: all of those.
        confidence: with ``"none"`` no cut may fall between tied scores; else none between zeros.
        among: the layers whose heads have roles; None: all of them.

    Raises:
        ConfigError: wrong scores, a dense layer whose heads have no role, a balance that does not divide, a budget
            nothing fits, a cut between tied scores.
    """
    if (fraction is None) == (kv_budget is None):
        raise ConfigError("heads: expected exactly one of retrieval_fraction and kv_budget.")
    layers, width = _check(scores, dense_layers, balance, among)
    own = range(layers) if among is None else among
    units = [unit for layer in own for unit in _units(scores[layer], layer, balance, granularity)]
    total = len(own) * width
    size = len(units[0].heads)
    always = [unit for unit in units if unit.layer in dense_layers]
    ranked = sorted((u for u in units if u.layer not in dense_layers), key=lambda u: (-u.score, u.layer, u.rank))
    if fraction is not None:
        wanted = _half_up(Fraction(_half_up(_exact(fraction) * total), size))
    else:
        form = (total, kv_budget_tokens, streaming_tokens, retrieval_tokens)
        wanted = heads_in_budget(kv_budget, *form) // size
        if wanted < len(always):
            least = _share(len(always) * size, *form)
            raise ConfigError(
                f"heads.kv_budget: got {kv_budget}, but dense_layers alone need more; smallest: {_up(least)}."
            )
    cut = max(0, wanted - len(always))
    _check_cut(ranked, cut, len(always), total, confidence)
    chosen = {(unit.layer, head) for unit in always + ranked[:cut] for head in unit.heads}
    rows = {layer: "".join("R" if (layer, h) in chosen else "S" for h in range(width)) for layer in own}
    return tuple(rows.get(layer, NONE * width) for layer in range(layers))


def given(
    roles: Sequence[str],
    *,
    dense_layers: Sequence[int] = (),
    balance: int = 1,
    granularity: str = "kv_head",
    among: Sequence[int] | None = None,
) -> tuple[str, ...]:
    """Roles that a config states itself, with ``dense_layers`` made retrieval; ``among`` as in `assign`.

    Raises:
        ConfigError: rows of unequal length, other letters than R and S, rows that break balance or granularity, or a
            dense layer whose heads have no role.
    """
    layers, width = _check(roles, dense_layers, balance, among)
    rows = ["R" * width if layer in dense_layers else row for layer, row in enumerate(roles)]
    step = width // balance
    for layer in range(layers):
        if among is not None and layer not in among:
            rows[layer] = NONE * width
            continue
        row = rows[layer]
        if set(row) - {"R", "S"}:
            raise ConfigError(f"heads.roles[{layer}]: got {row!r}, expected only the letters R and S.")
        if granularity == "layer" and len(set(row)) > 1:
            raise ConfigError(f"heads.roles[{layer}]: got {row!r}, expected one role per layer (granularity: layer).")
        counts = {row[i : i + step].count("R") for i in range(0, width, step)}
        if len(counts) > 1:
            raise ConfigError(f"heads.roles[{layer}]: got {row!r}, expected equally many R in {balance} equal slices.")
    return tuple(rows)


def heads_in_budget(
    kv_budget: float,
    total: int,
    tokens: int,
    streaming_tokens: int | Fraction,
    retrieval_tokens: int | Fraction | None = None,
) -> int:
    """Largest number of retrieval heads, of ``total``, whose KV bytes at ``tokens`` tokens are within ``kv_budget``.

    Raises:
        ConfigError: the heads need more, whatever their roles.
    """
    none, every = (_share(count, total, tokens, streaming_tokens, retrieval_tokens) for count in (0, total))
    budget = _exact(kv_budget)
    if budget >= every:
        return total
    if budget < none:
        raise ConfigError(
            f"heads.kv_budget: got {kv_budget}, but streaming heads that keep "
            f"{math.ceil(min(streaming_tokens, tokens))} tokens alone need more at {tokens} tokens (kv_budget_tokens); "
            f"smallest: {_up(min(none, every))}."
        )
    return math.floor((budget - none) / (every - none) * total)


def usable_cuts(scores: Sequence[float], confidence: str = "measured") -> list[int]:
    """Numbers of best heads, 0 and all of them included, that cut between no tied scores.

    A tie: both are zero, or of ``confidence`` "none" and equal.
    """
    ranked = sorted(scores, reverse=True)
    inner = (n for n in range(1, len(ranked)) if not _tied(*ranked[n - 1 : n + 1], confidence))
    return [0, *inner, len(ranked)] if ranked else [0]


def usable_fraction(rows: Sequence[Sequence[float]], fraction: float, confidence: str = "measured") -> float:
    """``fraction`` of the heads of scores ``rows``, lowered to a usable cut where its own is none (``usable_cuts``)."""
    scores = [score for row in rows for score in row]
    wanted = _half_up(_exact(fraction) * len(scores))
    cut = max(n for n in usable_cuts(scores, confidence) if n <= wanted)
    return fraction if cut == wanted else round(cut / len(scores), 6)


def slice_roles(roles: str, rank: int, size: int) -> str:
    """The roles of one layer's KV heads that process ``rank`` of ``size`` holds (tensor parallel): a slice.

    Raises:
        ConfigError: ``size`` does not divide the KV heads, or ``rank`` is outside it.
    """
    if size < 1 or len(roles) % size:
        raise ConfigError(f"tensor parallel size: got {size}, expected a divisor of the {len(roles)} KV heads.")
    if not 0 <= rank < size:
        raise ConfigError(f"tensor parallel rank: got {rank}, expected 0 to {size - 1}.")
    step = len(roles) // size
    return roles[rank * step : (rank + 1) * step]


def _check(
    rows: Sequence[Sequence], dense_layers: Sequence[int], balance: int, among: Sequence[int] | None
) -> tuple[int, int]:
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ConfigError(f"heads: got rows of {sorted({len(r) for r in rows})} KV heads, expected equal rows.")
    if any(not isinstance(row, str) and not all(-LARGEST <= score <= LARGEST for score in row) for row in rows):
        raise ConfigError(f"heads.scores: got nan or inf, or a number beyond {LARGEST:g}, expected finite numbers.")
    layers = len(rows)
    width = len(rows[0])
    for i, layer in enumerate(dense_layers):
        if not 0 <= layer < layers:
            raise ConfigError(f"heads.dense_layers[{i}]: got {layer}, expected a layer from 0 to {layers - 1}.")
        if among is not None and layer not in among:
            raise ConfigError(
                f"heads.dense_layers[{i}]: got {layer}, whose heads do not read the whole text in the model itself; "
                f"expected one of model.full_attention_layers {list(among)}."
            )
    if balance < 1 or width % balance:
        raise ConfigError(f"heads.balance: got {balance}, expected a divisor of the {width} KV heads.")
    return layers, width


def _units(row: Sequence[float], layer: int, balance: int, granularity: str) -> list[Unit]:
    if granularity == "layer":
        return [Unit(math.fsum(row) / len(row), layer, 0, tuple(range(len(row))))]
    step = len(row) // balance
    slices = [sorted(range(i, i + step), key=lambda h: (-row[h], h)) for i in range(0, len(row), step)]
    groups = zip(*slices, strict=True)
    return [Unit(math.fsum(row[h] for h in g) / balance, layer, rank, g) for rank, g in enumerate(groups)]


def _check_cut(ranked: list[Unit], cut: int, always: int, total: int, confidence: str) -> None:
    """Refuse a cut between heads with tied scores."""
    if not 0 < cut < len(ranked) or not _tied(ranked[cut - 1].score, ranked[cut].score, confidence):
        return
    tied = ranked[cut].score
    size = len(ranked[0].heads)
    below = sum(unit.score > tied for unit in ranked)
    through = below + sum(unit.score == tied for unit in ranked)
    usable, beyond = (round((always + n) * size / total, 6) for n in (below, through))
    raise ConfigError(
        f"heads: {cut + always} of {always + len(ranked)} choices cut among {through - below} equal scores of {tied}, "
        f"which were not measured apart; largest usable retrieval_fraction: {usable} (or {beyond}, with all of them)."
    )


def _tied(taken: float, left: float, confidence: str = "measured") -> bool:
    """Whether two scores are a tie: zeros were not measured, nor were equal scores of confidence none."""
    return taken == left and (taken == 0.0 or confidence == "none")


def _exact(number: float) -> Fraction:
    """The decimal number somebody wrote, so that 0.29 of 50 heads is 14.5 and not a little less."""
    return Fraction(repr(float(number)))


def _half_up(number: Fraction) -> int:
    return math.floor(number + Fraction(1, 2))


def _share(
    retrieval: int,
    total: int,
    tokens: int,
    streaming_tokens: int | Fraction,
    retrieval_tokens: int | Fraction | None,
) -> Fraction:
    kept = tokens if retrieval_tokens is None else retrieval_tokens
    return Fraction(retrieval * kept + (total - retrieval) * min(streaming_tokens, tokens)) / (total * tokens)


def _up(share: Fraction) -> float:
    """Rounded up, so that the number a message names does fit."""
    return math.ceil(share * 10**6) / 10**6
