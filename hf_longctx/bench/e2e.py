"""``bench e2e``: a whole model of random weights, prompt to logits and one decoded token, stock against patched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import report, unpatch_model
from ..errors import ConfigError
from ..layer_plan import FEWEST
from ..prefill.base import BLOCK
from .columns import (
    HALF,
    RETRIEVAL,
    SDPA,
    STOCK,
    STREAMING,
    check_same,
    dtype_of,
    make_model,
    patch,
    sparse_name,
)
from .measure import Samples, paired_ratio, turns
from .prefill import WARM, check_kernel
from .settings import VOCABULARY, Settings

Logits = tuple[Tensor, Tensor]  # of the prompt, and of the token after it


@torch.no_grad()
def run(settings: Settings) -> list[dict]:
    """One result per dtype and length; every column is the same model, patched and unpatched between the turns.

    Raises:
        ConfigError: ``density`` for a prompt that no pattern runs for.
    """
    if settings.density is not None and min(settings.tokens) < FEWEST:
        raise ConfigError(
            f"density: patterns run for prompts of at least {FEWEST} tokens, given {min(settings.tokens)}. Give longer "
            "prompts, or no density."
        )
    results = []
    for word in settings.dtypes:
        model = make_model(settings, dtype_of(word), "cpu")
        results += [_case(settings, word, model, tokens) for tokens in settings.tokens]
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


def _columns(settings: Settings, tokens: int) -> dict[str, dict | None]:
    """What each column's model is patched with, None for stock."""
    columns: dict[str, dict | None] = {
        STOCK: None,
        RETRIEVAL: {"roles": settings.all_heads("R")},
        HALF: {"roles": settings.half_streaming()},
        STREAMING: {"roles": settings.all_heads("S")},
    }
    if settings.density is not None:
        pattern = {"pattern": "block_topk", "top_k": top_k_for(settings.density, tokens)}
        prefill = {"min_tokens": 0, "retrieval": pattern}
        columns[sparse_name(settings.density)] = {"roles": columns[HALF]["roles"], "prefill": prefill}
    return columns


def _case(settings: Settings, word: str, model: Any, tokens: int) -> dict:
    columns = _columns(settings, tokens)
    ids = torch.randint(VOCABULARY, (1, tokens + 1))
    error = _check(settings, word, model, columns, ids)
    prefill, decode = ({name: Samples() for name in columns} for _ in range(2))
    first, ran = {}, {}
    for number, name in turns(columns, settings.rounds):
        logits, ran[name] = _turn(settings, model, columns[name], ids, prefill[name], decode[name])
        if number == 0:
            first[name] = logits
            if name in (STOCK, RETRIEVAL) and {STOCK, RETRIEVAL} <= first.keys():
                error = max(error, _same(f"the logits of {RETRIEVAL}", first[RETRIEVAL], first[STOCK], word))
    total = {name: Samples([a + b for a, b in zip(prefill[name].ms, decode[name].ms, strict=True)]) for name in columns}
    parts = {"prefill": prefill, "decode": decode, "total": total}
    figures = {
        name: {
            **ran[name],
            **{f"{part}_ms": samples[name].as_dict() for part, samples in parts.items()},
            **{f"{part}_ratio": paired_ratio(samples[name], samples[STOCK]) for part, samples in parts.items()},
        }
        for name in columns
    }
    return {"dtype": word, "tokens": tokens, "roles": columns[HALF]["roles"], "error": error, "columns": figures}


def _turn(
    settings: Settings,
    model: Any,
    how: dict | None,
    ids: Tensor,
    prefill: Samples,
    decode: Samples,
    keep: int = 1,
) -> tuple[Logits, dict]:
    """Logits of a prompt's last ``keep`` tokens (0: of all) and of the token after it, and what ran.

    The prompt is ``ids[:, :-1]``. ``how`` patches the model; None leaves it stock.
    """
    ran = {"kernel": SDPA}
    if how is not None:
        patch(model, settings, **how)
    try:
        out = prefill.time(lambda: model(ids[:, :-1], use_cache=True, logits_to_keep=keep))
        after = decode.time(lambda: model(ids[:, -1:], past_key_values=out.past_key_values, use_cache=True))
        if how is not None:
            found = report(model)
            ran = {"kernel": "+".join(found.kernels), "density": found.density}
    finally:
        unpatch_model(model)
    return (out.logits, after.logits), ran


def _check(settings: Settings, word: str, model: Any, columns: dict[str, dict | None], ids: Tensor) -> float:
    """Compare the columns, and warm them up, on the first tokens of the prompt; the largest error.

    All retrieval equals stock everywhere; the others do as long as their window holds the whole prompt. Here the sparse
    column lists every block, so it equals half streaming; lists with gaps are compared with their mask.
    """
    ids, columns, sparse = ids[:, : WARM + 1], dict(columns), None
    if settings.density is not None:
        sparse = sparse_name(settings.density)
        every = {"pattern": "block_topk", "top_k": ids.shape[1] // BLOCK + 1}
        columns[sparse] = {**columns[HALF], "prefill": {"min_tokens": 0, "retrieval": every}}
    got = {name: _turn(settings, model, how, ids, Samples(), Samples(), 0)[0] for name, how in columns.items()}
    whole = min(ids.shape[1] - 1, settings.sink + settings.recent)
    errors = [_same(f"the logits of {RETRIEVAL}", got[RETRIEVAL], got[STOCK], word)]
    for name in (HALF, STREAMING):
        errors.append(check_same(f"the logits of {name}", got[name][0][:, :whole], got[STOCK][0][:, :whole], word))
    if sparse is not None:
        errors.append(_same(f"the logits of {sparse}", got[sparse], got[HALF], word))
        errors.append(check_kernel(settings, word, ids.shape[1] - 1))
    return max(errors)


def _same(what: str, got: Logits, want: Logits, word: str) -> float:
    return max(check_same(what, one, other, word) for one, other in zip(got, want, strict=True))
