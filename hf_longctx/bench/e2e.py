"""``bench e2e``: a whole model of random weights, prompt to logits and one decoded token, stock against patched."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache.cache import cache_bytes
from ..cache.plan import FEWEST
from ..cache.seam import CACHE, cache_of
from ..config.config import LongCtxConfig
from ..errors import ConfigError
from ..model.patch import patch_model, unpatch_model
from ..model.report import report
from ..prefill.base import BLOCK
from .columns import (
    HALF,
    RETRIEVAL,
    STATIC,
    STOCK,
    STREAMING,
    check_same,
    dtype_of,
    make_model,
    patch,
    sparse_name,
)
from .measure import Samples, Told, paired_ratio, quiet, turns
from .prefill import WARM, check_kernel
from .presses import Press, find, kept_share
from .settings import VOCABULARY, Settings
from .static_cache import new_cache, refusal

Logits = tuple[Tensor, Tensor]  # of the prompt, and of the token after it


@dataclass(frozen=True)
class How:
    """How a column runs the stock model.

    Attributes:
        patch: what it is patched with: the arguments of ``columns.patch``, or a whole config.
        static: whether it gets a ``StaticCache`` for prompt and token.
        press: reads the prompt inside of it.
        other: what reads the prompt and decodes instead of the model: takes the arguments of ``turn`` from ``ids`` to
            ``decode`` and the number of decoded tokens, and returns what ran.
    """

    patch: dict | LongCtxConfig | None = None
    static: bool = False
    press: Press | None = None
    other: Callable[[Tensor, Samples, Samples, int], dict] | None = None


@dataclass(frozen=True)
class Manner:
    """How one case is measured.

    Attributes:
        steps: decoded tokens per timing.
        warm: tokens of the prompt over which the columns are compared first.
        loosen: times the tolerance of the dtype by which columns may differ that compute the same.
    """

    steps: int = 1
    warm: int = WARM
    loosen: float = 1.0


@torch.no_grad()
def run(settings: Settings, told: Told = quiet) -> list[dict]:
    """One result per dtype and length; every column is the same model, patched and unpatched between the turns.

    Raises:
        ConfigError: ``density`` for a prompt that no pattern runs for, or a press that cannot be had.
    """
    if settings.density is not None and min(settings.tokens) < FEWEST:
        raise ConfigError(
            f"density: patterns run for prompts of at least {FEWEST} tokens, given {min(settings.tokens)}. Give longer "
            "prompts, or no density."
        )
    press = None if settings.kvpress is None else find(settings.kvpress)
    results = []
    for word in settings.dtypes:
        model = make_model(settings, dtype_of(word), "cpu")
        for tokens in settings.tokens:
            columns = _columns(settings, tokens, press)
            ids = torch.randint(VOCABULARY, (1, tokens + 1))
            not_measured = refused(settings, model, columns, ids[:, : WARM + 1])
            ran = {name: how for name, how in columns.items() if name not in not_measured}
            figures, error = measure(settings, word, model, ran, ids, told)
            facts = {"roles": columns[HALF].patch["roles"], "error": error, "not_measured": not_measured}
            results.append({"dtype": word, "tokens": tokens, **facts, "columns": figures})
    return results


def top_k_for(density: int, tokens: int) -> int:
    """The ``top_k`` of block_topk that reads nearest to ``density`` percent of a prompt's causal blocks.

    If scores were random, that is: the first and the own block, which are read whatever their scores, then are among
    the ``top_k`` best of c blocks with the chance ``top_k / c``. What a prompt really reads is measured.
    """
    causal = range(1, -(-tokens // BLOCK) + 1)

    def reads(top_k: int) -> float:
        return sum(min(c, top_k + min(2, c) * max(0.0, 1 - top_k / c)) for c in causal)

    return min(causal, key=lambda top_k: abs(reads(top_k) - density / 100 * sum(causal)))


def _columns(settings: Settings, tokens: int, press: Press | None) -> dict[str, How]:
    half = settings.half_streaming()
    columns = {
        STOCK: How(),
        **({STATIC: How(static=True)} if settings.static else {}),
        RETRIEVAL: How({"roles": settings.all_heads("R")}),
        HALF: How({"roles": half}),
        STREAMING: How({"roles": settings.all_heads("S")}),
    }
    if settings.density is not None:
        pattern = {"pattern": "block_topk", "top_k": top_k_for(settings.density, tokens)}
        prefill = {"min_tokens": 0, "retrieval": pattern}
        columns[sparse_name(settings.density)] = How({"roles": half, "prefill": prefill})
    if press is not None:
        columns[settings.kvpress] = How(press=press)
    return columns


def refused(settings: Settings, model: Any, columns: dict[str, How], ids: Tensor) -> dict[str, str]:
    """The columns of other people's code that do not run here, and why."""
    found = {}
    for name, how in columns.items():
        if how.static or how.press is not None:
            found[name] = refusal(lambda: turn(settings, model, how, ids, Samples(), Samples()))  # noqa: B023
    return {name: why for name, why in found.items() if why is not None}


def measure(
    settings: Settings,
    word: str,
    model: Any,
    columns: dict[str, How],
    ids: Tensor,
    told: Told,
    manner: Manner = Manner(),
) -> tuple[dict, float]:
    """The figures of every column, and the largest error of those that must compute the same.

    Args:
        ids: ``[B, T]``, the last ``manner.steps`` of which are decoded.
    """
    error = _check(settings, word, model, columns, ids, manner)
    steps = manner.steps
    prefill, decode = ({name: Samples() for name in columns} for _ in range(2))
    first = {}
    ran = {}
    for number, name in turns(columns, settings.rounds, ids[:, steps:].numel(), told):
        logits, ran[name] = turn(settings, model, columns[name], ids, prefill[name], decode[name], steps=steps)
        if number == 0 and name in (STOCK, STATIC, RETRIEVAL):
            first[name] = logits
        if number == 0 and len(first) == len({STOCK, STATIC, RETRIEVAL} & columns.keys()):
            stock, loosen = first[STOCK], manner.loosen
            error = max(error, *(_same(f"the logits of {n}", got, stock, word, loosen) for n, got in first.items()))
            first = {}
    return _figures(ran, prefill, decode), error


def _figures(ran: dict[str, dict], prefill: dict[str, Samples], decode: dict[str, Samples]) -> dict[str, dict]:
    """By column what ran, the times of prompt, token and both, and their ratios to stock and to static."""
    total = {name: Samples([a + b for a, b in zip(prefill[name].ms, decode[name].ms, strict=True)]) for name in prefill}
    parts = {"prefill": prefill, "decode": decode, "total": total}
    return {
        name: {
            **ran[name],
            **{f"{part}_ms": samples[name].as_dict() for part, samples in parts.items()},
            **{f"{part}_ratio": paired_ratio(samples[name], samples[STOCK]) for part, samples in parts.items()},
            **{f"{p}_of_static": paired_ratio(s[name], s[STATIC]) for p, s in parts.items() if STATIC in prefill},
        }
        for name in prefill
    }


def turn(
    settings: Settings,
    model: Any,
    how: How,
    ids: Tensor,
    prefill: Samples,
    decode: Samples,
    keep: int = 1,
    steps: int = 1,
) -> tuple[Logits | None, dict]:
    """Logits of a prompt's last ``keep`` tokens (0: of all) and of the ``steps`` tokens after it, and what ran.

    The prompt is ``ids[:, :-steps]``. There are no logits of what is not the model.
    """
    if how.other is not None:
        return None, how.other(ids, prefill, decode, steps)
    ran = {"kernel": model.config._attn_implementation}
    tokens = ids.shape[1] - steps
    given = {CACHE: new_cache(model, ids.shape[1])} if how.static else {}
    where = {}
    _patch(settings, model, how)
    try:
        with nullcontext() if how.press is None else how.press(model):
            out = prefill.time(lambda: model(ids[:, :tokens], use_cache=True, logits_to_keep=keep, **given))
        kept = {CACHE: cache_of(out), "use_cache": True}
        if how.press is not None:
            ran["kept"] = kept_share(cache_of(out), tokens, settings.kv_heads)
            where = {"position_ids": torch.tensor([[tokens]])}  # the compressed cache counts fewer
        singles = ids[:, tokens:].split(1, 1)
        after = decode.time(lambda: [model(one, **kept, **where).logits for one in singles], steps)
        if how.patch is not None:
            found = report(model)
            ran = {"kernel": "+".join(found.kernels), "density": found.density}
        ran["kv_bytes"] = cache_bytes(cache_of(out))
    finally:
        unpatch_model(model)
    return (out.logits, torch.cat(after, 1)), ran


def _patch(settings: Settings, model: Any, how: How) -> None:
    if isinstance(how.patch, LongCtxConfig):
        patch_model(model, how.patch)
    elif how.patch is not None:
        patch(model, settings, **how.patch)


def _check(settings: Settings, word: str, model: Any, columns: dict[str, How], ids: Tensor, manner: Manner) -> float:
    """Compare the columns, and warm them up, on the first tokens of the prompt; the largest error.

    Static and all retrieval equal stock everywhere; the others do as long as their window holds the whole prompt. Here
    the sparse column lists every block, so it equals half streaming; lists with gaps are compared with their mask. A
    press or a config answers something else and is not compared.
    """
    steps, loosen = manner.steps, manner.loosen
    ids = ids[:, : manner.warm + steps]
    tokens = ids.shape[1] - steps
    columns = dict(columns)
    sparse = None
    if settings.density is not None:
        sparse = sparse_name(settings.density)
        every = {"pattern": "block_topk", "top_k": tokens // BLOCK + 1}
        columns[sparse] = How({**columns[HALF].patch, "prefill": {"min_tokens": 0, "retrieval": every}})
    got = {name: turn(settings, model, how, ids, Samples(), Samples(), 0, steps)[0] for name, how in columns.items()}
    whole = min(tokens, settings.sink + settings.recent)
    equal = [name for name in (STATIC, RETRIEVAL) if name in got]
    errors = [_same(f"the logits of {name}", got[name], got[STOCK], word, loosen) for name in equal]
    for name in (name for name in (HALF, STREAMING) if name in got):
        mine, stock = (got[one][0][:, :whole] for one in (name, STOCK))
        errors.append(check_same(f"the logits of {name}", mine, stock, word, loosen))
    if sparse is not None:
        errors.append(_same(f"the logits of {sparse}", got[sparse], got[HALF], word))
        errors.append(check_kernel(settings, word, tokens))
    return max(errors)


def _same(what: str, got: Logits, want: Logits, word: str, loosen: float = 1.0) -> float:
    return max(check_same(what, one, other, word, loosen) for one, other in zip(got, want, strict=True))
