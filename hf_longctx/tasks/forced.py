"""How likely a model finds the expected answers of a sample: teacher-forced, nothing is decoded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..cache.eviction import tell_prompt
from ..cache.seam import CACHE, cache_of
from ..errors import UnsupportedModeError
from .answer import input_device
from .base import Sample


@dataclass(frozen=True)
class ForcedAnswer:
    """One expected answer.

    Attributes:
        nll: negative log-likelihood of all its tokens, in nats.
        tokens: how many they are.
        right: whether each of them is the greedy choice after those before it.
    """

    nll: float
    tokens: int
    right: bool


@torch.no_grad()
def forced_answers(
    model: nn.Module, sample: Sample, chunk_size: int | None = None, together: bool = False
) -> list[ForcedAnswer]:
    """The expected answer of every question: one forward for the context, one per question over a copy of its cache.

    Far more can be told from these with few questions than from answers that are right or wrong. The cache is the one
    that the model makes for itself, dense or patched.

    Args:
        model: a causal language model in eval mode.
        chunk_size: tokens of a context per forward; None: all of them at once.
        together: read the context and each question in one forward, as a prompt that holds both; the context is then
            read once per question.

    Raises:
        UnsupportedModeError: the model is in training mode.
    """
    if model.training:
        raise UnsupportedModeError("forced_answers() needs the model in eval mode: call model.eval() first.")
    context = torch.as_tensor(sample.context, device=input_device(model))
    if not together:
        return forced_over(model, sample, _read(model, context, None, 1, chunk_size)[1], keep=False)
    found = []
    for question in sample.questions:
        prompt, target = (torch.as_tensor(ids, device=context.device) for ids in (question.prompt, question.target))
        logits, cache = _read(model, torch.cat([context, prompt]), None, 1, chunk_size)
        tell_prompt(cache, ended=True)
        if len(target) > 1:
            logits = torch.cat([logits, _read(model, target[:-1], cache, len(target) - 1)[0]])
        found.append(scored(logits, target))
    return found


@torch.no_grad()
def forced_over(model: nn.Module, sample: Sample, cache: Any, keep: bool = True) -> list[ForcedAnswer]:
    """As ``forced_answers``, over copies of a cache that has read the context.

    Args:
        keep: leave the cache as it is; else the last question takes it, and one copy less is made.
    """
    return [one for one, _ in expected(model, sample, cache, keep=keep)]


def expected(
    model: nn.Module, sample: Sample, cache: Any, mode: str = "requests", keep: bool = False
) -> Iterator[tuple[ForcedAnswer, Tensor]]:
    """(how likely each expected answer is, the logits ``[A, V]`` that predict it), one forward per question.

    Args:
        cache: has read the context. "requests" are asked of copies of it; the last, unless ``keep``, and "turns", where
            each question follows the expected answer to the one before, of the cache itself.
    """
    device = input_device(model)
    turns = mode == "turns"
    unread: list[int] = []
    for i, question in enumerate(sample.questions):
        own = turns or (not keep and i + 1 == len(sample.questions))
        before = [*unread, *sample.between] if turns and i else []
        target = torch.as_tensor(question.target, device=device)
        prompt = torch.tensor([*before, *question.prompt.tolist()], device=device)
        with torch.no_grad():
            logits = _along(model, prompt, target, cache if own else copy.deepcopy(cache))
        yield scored(logits, target), logits
        unread = question.target[-1:].tolist()


def _along(model: nn.Module, prompt: Tensor, target: Tensor, cache: Any) -> Tensor:
    """Logits ``[A, V]`` that predict ``target [A]`` after the cached tokens and ``prompt [T]``, in one forward.

    In two where the end of the prompt changes what is cached.
    """
    if not getattr(cache, "evicts", False):
        return _read(model, torch.cat([prompt, target[:-1]]), cache, len(target))[0]
    tell_prompt(cache, ended=False)
    logits, _ = _read(model, prompt, cache, 1)
    tell_prompt(cache, ended=True)
    if len(target) == 1:
        return logits
    return torch.cat([logits, _read(model, target[:-1], cache, len(target) - 1)[0]])


def _read(model: nn.Module, ids: Tensor, cache: Any, keep: int, chunk: int | None = None) -> tuple[Tensor, Any]:
    """Logits ``[keep, V]`` after the last of ``ids [T]``, and the cache, which has grown by all of them."""
    for piece in ids.split(chunk or len(ids)):
        out = model(piece[None], **{CACHE: cache}, use_cache=True, logits_to_keep=keep)
        cache = cache_of(out)
        if chunk is not None:
            tell_prompt(cache, ended=False)
    return out.logits[0], cache


def scored(logits: Tensor, target: Tensor) -> ForcedAnswer:
    """The answer ``target [A]`` by the logits ``[A, V]`` that predict it."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = target.to(logits.device)
    nll = cross_entropy(logits, target, reduction="sum").item()
    return ForcedAnswer(nll, len(target), bool((logits.argmax(-1) == target).all()))
