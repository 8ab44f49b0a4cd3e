"""``bench e2e``: a whole model of random weights, prompt to logits and one decoded token, stock against patched."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache.plan import FEWEST
from ..cache.seam import CACHE, cache_of
from ..errors import ConfigError
from ..model.patch import unpatch_model
from ..model.report import report
from ..prefill.base import BLOCK
from .columns import (
    HALF,
    RETRIEVAL,
    SDPA,
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
        patch: what it is patched with.
        static: whether it gets a ``StaticCache`` for prompt and token.
        press: reads the prompt inside of it.
    """

    patch: dict | None = None
    static: bool = False
    press: Press | None = None


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
            not_measured = _refused(settings, model, columns, min(tokens, WARM))
            ran = {name: how for name, how in columns.items() if name not in not_measured}
            results.append(_case(settings, word, model, tokens, ran, told) | {"not_measured": not_measured})
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


def _refused(settings: Settings, model: Any, columns: dict[str, How], tokens: int) -> dict[str, str]:
    """The columns of other people's code that do not run here, and why."""
    ids = torch.randint(VOCABULARY, (1, tokens + 1))
    found = {}
    for name, how in columns.items():
        if how.static or how.press is not None:
            found[name] = refusal(lambda: _turn(settings, model, how, ids, Samples(), Samples()))  # noqa: B023
    return {name: why for name, why in found.items() if why is not None}


def _case(settings: Settings, word: str, model: Any, tokens: int, columns: dict[str, How], told: Told) -> dict:
    ids = torch.randint(VOCABULARY, (1, tokens + 1))
    error = _check(settings, word, model, columns, ids)
    prefill, decode = ({name: Samples() for name in columns} for _ in range(2))
    first = {}
    ran = {}
    for number, name in turns(columns, settings.rounds, tokens, told):
        logits, ran[name] = _turn(settings, model, columns[name], ids, prefill[name], decode[name])
        if number == 0 and name in (STOCK, STATIC, RETRIEVAL):
            first[name] = logits
        if number == 0 and len(first) == len({STOCK, STATIC, RETRIEVAL} & columns.keys()):
            error = max(error, *(_same(f"the logits of {n}", got, first[STOCK], word) for n, got in first.items()))
            first = {}
    total = {name: Samples([a + b for a, b in zip(prefill[name].ms, decode[name].ms, strict=True)]) for name in columns}
    parts = {"prefill": prefill, "decode": decode, "total": total}
    figures = {
        name: {
            **ran[name],
            **{f"{part}_ms": samples[name].as_dict() for part, samples in parts.items()},
            **{f"{part}_ratio": paired_ratio(samples[name], samples[STOCK]) for part, samples in parts.items()},
            **{f"{p}_of_static": paired_ratio(s[name], s[STATIC]) for p, s in parts.items() if STATIC in columns},
        }
        for name in columns
    }
    roles = columns[HALF].patch["roles"]
    return {"dtype": word, "tokens": tokens, "roles": roles, "error": error, "columns": figures}


def _turn(
    settings: Settings,
    model: Any,
    how: How,
    ids: Tensor,
    prefill: Samples,
    decode: Samples,
    keep: int = 1,
) -> tuple[Logits, dict]:
    """Logits of a prompt's last ``keep`` tokens (0: of all) and of the token after it, and what ran.

    The prompt is ``ids[:, :-1]``.
    """
    ran = {"kernel": SDPA}
    tokens = ids.shape[1] - 1
    if how.patch is not None:
        patch(model, settings, **how.patch)
    given = {CACHE: new_cache(model, tokens + 1)} if how.static else {}
    where = {}
    try:
        with nullcontext() if how.press is None else how.press(model):
            out = prefill.time(lambda: model(ids[:, :-1], use_cache=True, logits_to_keep=keep, **given))
        kept = {CACHE: cache_of(out), "use_cache": True}
        if how.press is not None:
            ran["kept"] = kept_share(cache_of(out), tokens, settings.kv_heads)
            where = {"position_ids": torch.tensor([[tokens]])}  # the compressed cache counts fewer
        after = decode.time(lambda: model(ids[:, -1:], **kept, **where))
        if how.patch is not None:
            found = report(model)
            ran = {"kernel": "+".join(found.kernels), "density": found.density}
    finally:
        unpatch_model(model)
    return (out.logits, after.logits), ran


def _check(settings: Settings, word: str, model: Any, columns: dict[str, How], ids: Tensor) -> float:
    """Compare the columns, and warm them up, on the first tokens of the prompt; the largest error.

    Static and all retrieval equal stock everywhere; the others do as long as their window holds the whole prompt. Here
    the sparse column lists every block, so it equals half streaming; lists with gaps are compared with their mask. A
    press answers something else and is not compared.
    """
    ids = ids[:, : WARM + 1]
    columns = dict(columns)
    sparse = None
    if settings.density is not None:
        sparse = sparse_name(settings.density)
        every = {"pattern": "block_topk", "top_k": ids.shape[1] // BLOCK + 1}
        columns[sparse] = How({**columns[HALF].patch, "prefill": {"min_tokens": 0, "retrieval": every}})
    got = {name: _turn(settings, model, how, ids, Samples(), Samples(), 0)[0] for name, how in columns.items()}
    whole = min(ids.shape[1] - 1, settings.sink + settings.recent)
    equal = [name for name in (STATIC, RETRIEVAL) if name in got]
    errors = [_same(f"the logits of {name}", got[name], got[STOCK], word) for name in equal]
    for name in (HALF, STREAMING):
        errors.append(check_same(f"the logits of {name}", got[name][0][:, :whole], got[STOCK][0][:, :whole], word))
    if sparse is not None:
        errors.append(_same(f"the logits of {sparse}", got[sparse], got[HALF], word))
        errors.append(check_kernel(settings, word, ids.shape[1] - 1))
    return max(errors)


def _same(what: str, got: Logits, want: Logits, word: str) -> float:
    return max(check_same(what, one, other, word) for one, other in zip(got, want, strict=True))
