"""How roles are found: one file and one word per method, and ``identify``, which runs one and writes a config."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..config.bounds import TOKENS
from ..config.config import LongCtxConfig
from ..config.find import checkpoint_name
from ..config.head_map import usable_fraction
from ..config.model import made_for, model_facts
from ..config.words import build, convert, dump, is_spec, spec_word, words
from ..errors import ConfigError, UnsupportedModeError, UnsupportedModelError
from ..model.modules import language_model, name_of, state_of, unwrap
from ..model.patch import patched
from ..tasks.documents import Documents, RandomTokens, documents_for
from .methods.base import HeadProbe, Method, check_scores, modes_kept
from .share import ShareSearch

SHARE = {"min": 0.0, "max": 1.0}
DROP = {"min": 0.0, "max": 0.999}
RISE = {"min": 0.0, "max": 100.0, "unit": "nats per token"}
MEASURED = {**TOKENS, "min": 2}
SEED = {"min": 0, "max": 2**63 - 1}


def identify(
    model: nn.Module,
    tokenizer: Any,
    method: str | Method = "two_needle",
    *,
    text: str | os.PathLike | None = None,
    retrieval_fraction: float | None = None,
    target_drop: float | None = None,
    target_nll: float | None = None,
    measure_tokens: int | None = None,
    sink: int = 64,
    recent: int = 256,
    seed: int = 0,
    work: str | os.PathLike | None = None,
    progress: bool = False,
    **options: Any,
) -> LongCtxConfig:
    """Measure which KV heads of a model need the whole context, and return a config that says so.

    The model is patched while it is measured, so no other thread may use it meanwhile, and left as it was. See
    ``docs/heads.md`` for what each method costs.

    Args:
        model: a loaded causal language model of a family in ``patches/``, on any device, patched or not.
        tokenizer: its tokenizer; the documents are made with it. "echo_induction" needs none without ``text`` and
            a target: given None, it draws from all of the model's token ids but the special ones.
        method: a word of ``hf_longctx/identification/methods``: "duo_gates" (arXiv:2410.10819), "retrieval_score"
            (arXiv:2404.15574), "echo_induction" (arXiv:2407.15891), "two_needle" (arXiv:2605.16928) or another one, a
            word that was registered, or the object of such a class.
        text: a file or folder to take the documents' filler from, instead of random tokens.
        retrieval_fraction: share of retrieval heads of the config; default 0.5, or 0.25 where every query head has a KV
            head of its own, as DuoAttention uses them, lowered where fewer heads were told apart.
        target_drop: find the share instead: the smallest one that loses at most this much of the exact match, or with
            ``text`` of the next-token agreement and the perplexity, against the dense model.
        target_nll: find the smallest share by how likely the expected answers stay instead, or with ``text`` the
            text: at most so many nats per token less than dense. It tells shares apart with far fewer questions.
        measure_tokens: tokens of a document, or of a piece of the text, that the share is measured on; default: what
            the model was made for, at most 4096.
        sink, recent: tokens a streaming head keeps, in the measurement and in the config.
        seed: random seed.
        work: a folder where a method that takes long saves its state, and goes on from.
        progress: show how far it is on stderr: a bar, or where that is no terminal a line now and then.
        options: fields of the method.

    Returns:
        A config with the scores, where they come from, and what was measured; write it with ``to_yaml``.

    Raises:
        ConfigError: an unknown method or option, an argument out of bounds or without a use, an unreadable text, no
            tokenizer where one is needed, another model's tokenizer, or scores in which no head stands out.
        UnsupportedModelError: the family is not in ``patches/``, the model has no LM head, or it answers nothing.
        UnsupportedModeError: the model is spread over processes by tensor parallelism.
    """
    chosen = _method(method, options)
    method = spec_word(chosen)
    target = _target(target_drop, target_nll)
    _check(chosen, method, retrieval_fraction, target, measure_tokens, text, work, seed)
    plain = all_retrieval(model, sink, recent)
    with modes_kept(model), patched(model, plain):
        model.eval()
        without = tokenizer is None and not needs_tokenizer(chosen, text, target is not None)
        documents = RandomTokens(_plain_ids(unwrap(model))) if without else documents_for(tokenizer, text)
        probe = probe_of(model, tokenizer, documents, seed, work, progress)
        search = None if target is None else ShareSearch(probe, measure_tokens, target.most, target.by)
        if text is not None:
            probe.measured["text"] = Path(text).name
        scores = chosen.scores(probe)
        scores[list(probe.windowed)] = 0  # their heads keep the model's own window, whatever they score
        config = _config(plain, model, method, chosen, scores, probe)
        if search is None:
            return config.override(heads={"retrieval_fraction": _fraction(config, retrieval_fraction)})
        found, curve = search.smallest(model, config)
    told = {target.name: target.most, "curve_tokens": search.tokens, "curve": curve}
    return config.override(heads={"retrieval_fraction": found, "measured": {**config.heads.measured, **told}})


def methods() -> tuple[str, ...]:
    """The words of this folder."""
    return words("identification.methods")


def _method(method: str | Method, options: dict[str, Any]) -> Method:
    """The method that a word and its fields, or an object, name."""
    if is_spec(method) and options:
        raise ConfigError(f"identify: {', '.join(options)} given beside a method object; its fields are set in it.")
    given = method if is_spec(method) else {"method": method, **options}
    return build("identification.methods", given, "method", "identify")


class Target(NamedTuple):
    """What the share of retrieval heads is looked for by: at most ``most`` of it may be lost."""

    name: str
    by: Literal["drop", "rise"]
    most: float


def _target(drop: Any, nll: Any) -> Target | None:
    convert(drop, float | None, "target_drop", DROP)
    convert(nll, float | None, "target_nll", RISE)
    if drop is not None and nll is not None:
        raise ConfigError("target_nll: it finds the share, so target_drop cannot be given as well.")
    if drop is None:
        return None if nll is None else Target("target_nll", "rise", nll)
    return Target("target_drop", "drop", drop)


def _check(
    chosen: Method, method: str, fraction: Any, target: Target | None, tokens: Any, text: Any, work: Any, seed: Any
) -> None:
    """Everything that can be refused before anything is measured."""
    for name, value, hint, bounds in (
        ("retrieval_fraction", fraction, float | None, SHARE),
        ("measure_tokens", tokens, int | None, MEASURED),
        ("seed", seed, int, SEED),
    ):
        convert(value, hint, name, bounds)
    if fraction is not None and target is not None:
        raise ConfigError(f"{target.name}: it finds the share, so retrieval_fraction cannot be given as well.")
    if tokens is not None and target is None:
        raise ConfigError("measure_tokens: only target_drop and target_nll measure the share; give one of them too.")
    if text is not None and target is None and not chosen.reads_documents:
        raise ConfigError(
            f"text: {method} reads random tokens only; a text has a use with target_drop or target_nll alone."
        )
    if work is not None and not chosen.saves:
        raise ConfigError(f"work: {method} saves nothing on its way; leave it out.")


def all_retrieval(model: nn.Module, sink: int = 64, recent: int = 256) -> LongCtxConfig:
    """All heads retrieval: dense, but observable."""
    described = LongCtxConfig.describe(language_model(model).config)
    roles = ["R" * described["num_key_value_heads"]] * described["num_hidden_layers"]
    streaming = {"store": "sink_recent", "sink": sink, "recent": recent}
    return LongCtxConfig.from_dict({"model": described, "heads": {"roles": roles}, "stores": {"streaming": streaming}})


def needs_tokenizer(chosen: Method, text: Any, finds_share: bool) -> bool:
    """Whether ``identify`` with these arguments reads or writes any text."""
    return chosen.needs_tokenizer or text is not None or finds_share


def _plain_ids(inner: nn.Module) -> list[int]:
    """The model's token ids but those that its configs call special."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    configs = (language_model(inner).config, inner.generation_config)
    given = [getattr(one, name, None) for one in configs for name in names]
    special = {i for one in given if one is not None for i in (one if isinstance(one, (list, tuple)) else [one])}
    return [i for i in range(inner.get_input_embeddings().num_embeddings) if i not in special]


def probe_of(model: nn.Module, tokenizer: Any, documents: Documents, seed: int, work: Any, progress: bool) -> HeadProbe:
    """What is measured, of a model patched with ``all_retrieval``; errors as ``identify``."""
    inner = unwrap(model)
    hf_config = language_model(inner).config
    plans = state_of(model).plans
    kv_heads = model_facts(hf_config)["num_key_value_heads"]
    if inner.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{type(inner).__name__} has no LM head: load it with AutoModelForCausalLM.")
    if any(plan.kv_heads != kv_heads for plan in plans):
        raise UnsupportedModeError(
            f"identify measures all {kv_heads} KV heads of a layer at once, and this process holds a part of them. "
            "Load the model without tensor parallelism; the config then serves any number of processes."
        )
    measurable = {plan.layer_idx for plan in plans if plan.window is None}
    windowed = tuple(i for i in range(hf_config.num_hidden_layers) if i not in measurable)
    if not measurable:
        raise ConfigError("identify: every layer has a sliding window of its own, so there is nothing to measure.")
    reach = 0 if tokenizer is None else max(tokenizer.get_vocab().values(), default=0)
    if reach >= (known := inner.get_input_embeddings().num_embeddings):
        raise ConfigError(f"tokenizer: its ids reach {reach}, but the model knows {known}. Is it this model's own?")
    bounds = [tokens for tokens in (made_for(hf_config), documents.longest) if tokens]
    return HeadProbe(
        model=inner,
        layers=hf_config.num_hidden_layers,
        heads=hf_config.num_attention_heads,
        kv_heads=kv_heads,
        documents=documents,
        windowed=windowed,
        seed=seed,
        longest=min(bounds, default=HeadProbe.longest),
        work=None if work is None else Path(work),
        progress=progress,
        measured={"tokenizer": "none"} if tokenizer is None else {},
    )


def _config(
    plain: LongCtxConfig, model: nn.Module, method: str, chosen: Method, scores: torch.Tensor, probe: HeadProbe
) -> LongCtxConfig:
    check_scores(scores, method)
    name, _ = checkpoint_name(name_of(model))
    data = plain.to_dict()
    data["model"]["ids"] = [name] if name else []
    measured = {"seed": probe.seed, "options": dump(chosen), **probe.measured}
    measured |= {"doubts": probe.doubts} if probe.doubts else {}
    data["heads"] = {
        "source": {"method": method, "from": f"hf_longctx {version('hf-longctx')}", "paper": chosen.paper},
        "scores": [[float(f"{score:.4g}") for score in row] for row in scores.tolist()],
        "retrieval_fraction": 1.0,
        "confidence": "low" if probe.doubts else "measured",
        "measured": measured,
    }
    return LongCtxConfig.from_dict(data)


def _fraction(config: LongCtxConfig, wanted: float | None) -> float:
    """The share asked for, or the default one, lowered to one that the scores can carry."""
    if wanted is not None:
        return wanted
    default = 0.25 if config.model.num_attention_heads == config.model.num_key_value_heads else 0.5
    return usable_fraction(config.scores, default)
