"""``bench e2e``: a whole model of random weights, prompt to logits and one decoded token, stock against patched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import unpatch_model
from .columns import HALF, RETRIEVAL, STOCK, STREAMING, check_same, dtype_of, make_model, patch
from .measure import Samples, paired_ratio, turns
from .settings import VOCABULARY, Settings

TOKENS = (512, 1024)


@torch.no_grad()
def run(settings: Settings) -> list[dict]:
    """One result per dtype and length; every column is the same model, patched and unpatched between the turns."""
    results = []
    for word in settings.dtypes:
        model = make_model(settings, dtype_of(word), "cpu")
        results += [_case(settings, word, model, tokens) for tokens in settings.tokens]
    return results


def _case(settings: Settings, word: str, model: Any, tokens: int) -> dict:
    columns = {
        STOCK: None,
        RETRIEVAL: settings.all_heads("R"),
        HALF: settings.half_streaming(),
        STREAMING: settings.all_heads("S"),
    }
    ids = torch.randint(VOCABULARY, (1, tokens + 1))
    logits = {name: _turn(settings, model, roles, ids, Samples(), Samples()) for name, roles in columns.items()}
    error = _check(settings, word, logits, tokens)
    del logits
    prefill, decode = ({name: Samples() for name in columns} for _ in range(2))
    for _, name in turns(columns, settings.rounds):
        _turn(settings, model, columns[name], ids, prefill[name], decode[name])
    total = {name: Samples([a + b for a, b in zip(prefill[name].ms, decode[name].ms, strict=True)]) for name in columns}
    parts = {"prefill": prefill, "decode": decode, "total": total}
    figures = {
        name: {
            **{f"{part}_ms": samples[name].as_dict() for part, samples in parts.items()},
            **{f"{part}_ratio": paired_ratio(samples[name], samples[STOCK]) for part, samples in parts.items()},
        }
        for name in columns
    }
    return {"dtype": word, "tokens": tokens, "roles": columns[HALF], "error": error, "columns": figures}


def _turn(
    settings: Settings, model: Any, roles: list[str] | None, ids: Tensor, prefill: Samples, decode: Samples
) -> tuple[Tensor, Tensor]:
    """Logits of a prompt and of the token after it, from one patched (or stock, for roles None) forward each."""
    if roles is not None:
        patch(model, settings, roles)
    try:
        out = prefill.time(lambda: model(ids[:, :-1], use_cache=True))
        after = decode.time(lambda: model(ids[:, -1:], past_key_values=out.past_key_values, use_cache=True))
    finally:
        unpatch_model(model)
    return out.logits, after.logits


def _check(settings: Settings, word: str, logits: dict[str, tuple[Tensor, Tensor]], tokens: int) -> float:
    """All retrieval equals stock everywhere; the others do as long as their window holds the whole prompt."""
    whole = min(tokens, settings.sink + settings.recent)
    errors = [
        check_same(f"the logits of {RETRIEVAL}", got, want, word)
        for got, want in zip(logits[RETRIEVAL], logits[STOCK], strict=True)
    ]
    for name in (HALF, STREAMING):
        got, want = logits[name][0][:, :whole], logits[STOCK][0][:, :whole]
        errors.append(check_same(f"the logits of {name}", got, want, word))
    return max(errors)
