"""How roles are found: one file and one word per method, and ``identify``, which runs one and writes a config."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import LongCtxConfig
from ..errors import ConfigError, UnsupportedModeError
from ..layer_plan import LayerPlan
from ..patch import patched, state_of, unwrap
from ..registry import build, dump, words
from ..tasks.documents import documents_for
from ..tasks.haystack import TextHaystack
from ._share import ExactMatch, NextToken, Yardstick, smallest, usable_cuts
from .base import Method, Subject

QUESTIONS, PIECES = 128, 4  # asked, or pieces of text read, for every share that is measured


def identify(
    model: nn.Module,
    tokenizer: Any,
    method: str = "echo_induction",
    *,
    text: str | os.PathLike | None = None,
    retrieval_fraction: float | None = None,
    target_drop: float | None = None,
    measure_tokens: int | None = None,
    sink: int = 64,
    recent: int = 256,
    seed: int = 0,
    work: str | os.PathLike | None = None,
    progress: bool = False,
    **options: Any,
) -> LongCtxConfig:
    """Measure which KV heads of a model need the whole context, and return a config that says so.

    The model is patched while it is measured and left as it was. See ``docs/heads.md`` for what each method costs.

    Args:
        model: a loaded model of a family in ``patches/``, on any device, patched or not.
        tokenizer: its tokenizer; the documents are made with it.
        method: a word of ``hf_longctx/identify``: "duo_gates" (arXiv:2410.10819), "retrieval_score"
            (arXiv:2404.15574), "echo_induction" (arXiv:2407.15891) or "two_needle" (arXiv:2605.16928).
        text: a file or folder to take the documents' filler from, instead of random tokens.
        retrieval_fraction: share of retrieval heads of the config; default 0.5, or 0.25 where every query head has a KV
            head of its own, as DuoAttention uses them, lowered where fewer heads were told apart.
        target_drop: find the share instead: the smallest one that loses at most this much of the exact match, or with
            ``text`` of the next-token agreement and the perplexity, against the dense model.
        measure_tokens: tokens of a text that ``target_drop`` is measured on; default: what the model was made for, at
            most 4096.
        sink, recent: tokens a streaming head keeps, in the measurement and in the config.
        seed: of everything drawn.
        work: a folder where a long method saves its state, and goes on from.
        progress: show progress bars on stderr.
        options: fields of the method.

    Returns:
        A config with the scores, where they come from, and what was measured; write it with ``to_yaml``.

    Raises:
        ConfigError: unknown method or option, two ways to choose the share, an unreadable text or one without a use.
        UnsupportedModelError: the family is not in ``patches/``, or the model answers nothing.
        UnsupportedModeError: the model is spread over processes by tensor parallelism.
    """
    chosen: Method = build("identify", {"method": method, **options}, "method", "identify")
    _check_share(retrieval_fraction, target_drop, measure_tokens)
    if text is not None and target_drop is None and not chosen.reads_documents:
        raise ConfigError(f"text: {method} reads random tokens only; a text has a use with target_drop alone.")
    plain = _plain(model, sink, recent)
    training = model.training
    model.eval()
    try:
        with patched(model, plain):
            plans = _plans(model, plain.model.num_key_value_heads)
            subject = _subject(model, tokenizer, text, seed, work, progress)
            scores = _without_sliding(chosen.scores(subject), plans)
        config = _config(plain, model, method, chosen, scores, subject)
        if target_drop is None:
            return config.override(heads={"retrieval_fraction": _fraction(config, retrieval_fraction)})
        return _with_share(model, config, subject, target_drop, measure_tokens)
    finally:
        model.train(training)


def _check_share(fraction: float | None, target_drop: float | None, tokens: int | None) -> None:
    if fraction is not None and target_drop is not None:
        raise ConfigError("target_drop: it finds the share, so retrieval_fraction cannot be given as well.")
    if target_drop is not None and not 0 <= target_drop < 1:
        raise ConfigError(f"target_drop: got {target_drop!r}, expected a share from 0 to below 1.")
    if tokens is not None and target_drop is None:
        raise ConfigError("measure_tokens: only target_drop measures the share; give both or none.")


def _plain(model: nn.Module, sink: int, recent: int) -> LongCtxConfig:
    """All heads retrieval: dense, but observable."""
    described = LongCtxConfig.describe(unwrap(model).base_model.config)
    roles = ["R" * described["num_key_value_heads"]] * described["num_hidden_layers"]
    streaming = {"store": "sink_recent", "sink": sink, "recent": recent}
    return LongCtxConfig.from_dict({"model": described, "heads": {"roles": roles}, "stores": {"streaming": streaming}})


def _subject(model: nn.Module, tokenizer: Any, text: Any, seed: int, work: Any, progress: bool) -> Subject:
    inner = unwrap(model)
    hf_config = inner.base_model.config
    documents = documents_for(tokenizer, text)
    return Subject(
        model=inner,
        layers=hf_config.num_hidden_layers,
        heads=hf_config.num_attention_heads,
        kv_heads=hf_config.num_key_value_heads,
        documents=documents,
        seed=seed,
        longest=min(hf_config.max_position_embeddings, documents.longest or hf_config.max_position_embeddings),
        work=None if work is None else Path(work),
        progress=progress,
    )


def _config(
    plain: LongCtxConfig, model: nn.Module, method: str, chosen: Method, scores: torch.Tensor, subject: Subject
) -> LongCtxConfig:
    if not torch.isfinite(scores).all():
        raise ConfigError(f"identify: {method} gave scores that are nan or inf; is the model's dtype too narrow?")
    data = plain.to_dict()
    data["model"]["ids"] = _ids(getattr(unwrap(model).base_model.config, "_name_or_path", ""))
    measured = {"seed": subject.seed, "options": dump(chosen), **subject.measured}
    data["heads"] = {
        "source": {"method": method, "from": f"hf_longctx {version('hf-longctx')}", "paper": chosen.paper},
        "scores": [[float(f"{score:.4g}") for score in row] for row in scores.tolist()],
        "retrieval_fraction": 1.0,
        "confidence": "measured",
        "measured": measured,
    }
    return LongCtxConfig.from_dict(data)


def _plans(model: nn.Module, kv_heads: int) -> tuple[LayerPlan, ...]:
    plans = state_of(model).plans
    if any(len(plan.roles) != kv_heads for plan in plans):
        raise UnsupportedModeError(
            f"identify measures all {kv_heads} KV heads of a layer at once, and this process holds a part of them. "
            "Load the model without tensor parallelism; the config then serves any number of processes."
        )
    return plans


def _without_sliding(scores: torch.Tensor, plans: tuple[LayerPlan, ...]) -> torch.Tensor:
    """Layers with a sliding window of the model's own score 0: their heads cannot be retrieval heads."""
    scores[[plan.layer_idx for plan in plans if plan.sliding]] = 0
    return scores


def _ids(name: str) -> list[str]:
    """A hub id as it is; of a folder its last part, by which ``auto`` knows it wherever it lies."""
    return [Path(name).name if os.path.isdir(name) else name] if name else []


def _fraction(config: LongCtxConfig, wanted: float | None) -> float:
    """The share asked for, or the default one, lowered to one that the scores can carry."""
    if wanted is not None:
        return wanted
    model, scores = config.model, torch.tensor(config.heads.scores).numpy()
    default = 0.25 if model.num_attention_heads == model.num_key_value_heads else 0.5
    most = int(default * scores.size + 0.5)
    return share_of(max(n for n in usable_cuts(scores) if n <= most), scores.size)


def share_of(heads: int, total: int) -> float:
    """A short share that stands for exactly ``heads`` of ``total`` heads."""
    return round(heads / total, 6)


def _with_share(
    model: nn.Module, config: LongCtxConfig, subject: Subject, target: float, tokens: int | None
) -> LongCtxConfig:
    scores = torch.tensor(config.heads.scores).numpy()
    tokens = subject.length(tokens, 4096)
    yardstick = _yardstick(subject, tokens)
    inner = unwrap(model)

    def measure(heads: int) -> dict[str, float]:
        with patched(model, config, heads={"retrieval_fraction": share_of(heads, scores.size)}):
            return yardstick.measure(inner)

    found, curve = smallest(usable_cuts(scores), scores.size, measure, yardstick, target)
    measured = {**config.heads.measured, "target_drop": target, "curve_tokens": tokens, "curve": curve}
    return config.override(heads={"retrieval_fraction": share_of(found, scores.size), "measured": measured})


def _yardstick(subject: Subject, length: int) -> Yardstick:
    haystack = subject.documents.haystack
    if isinstance(haystack, TextHaystack):
        return NextToken(subject, haystack, length, PIECES)
    return ExactMatch(subject, length, QUESTIONS)


def methods() -> tuple[str, ...]:
    """The words of this folder."""
    return words("identify")
