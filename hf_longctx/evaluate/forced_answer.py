"""How likely a model finds the expected answers of a sample: teacher-forced, nothing is decoded."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..cache.seam import CACHE, cache_of
from ..errors import UnsupportedModeError
from ..model.modules import language_model
from ..tasks.answer import input_device
from ..tasks.base import Sample
from .measures import LOGITS


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
        model: a causal language model in eval mode whose logits are its output embedding's (``output_head``).
        chunk_size: tokens of a context per forward; None: all of them at once.
        together: read the context and each question in one forward, as a prompt that holds both; the context is then
            read once per question.

    Raises:
        UnsupportedModeError: the model is in training mode.
    """
    if model.training:
        raise UnsupportedModeError("forced_answers() needs the model in eval mode: call model.eval() first.")
    device = input_device(model)
    context = torch.as_tensor(sample.context, device=device)
    read = None if together else _read(model, context, None, chunk_size)[1]
    found = []
    for i, question in enumerate(sample.questions):
        prompt = torch.as_tensor(question.prompt, device=device)
        target = torch.as_tensor(question.target, device=device)
        if together:
            last, cache = _read(model, torch.cat([context, prompt]), None, chunk_size)
            states = _read(model, target[:-1], cache, None)[0] if len(target) > 1 else last[:0]
            states = torch.cat([last[-1:], states])
        else:
            cache = read if i + 1 == len(sample.questions) else copy.deepcopy(read)
            states = _read(model, torch.cat([prompt, target[:-1]]), cache, None)[0][-len(target) :]
        found.append(scored(model, states, target))
    return found


def _read(model: nn.Module, ids: Tensor, cache: Any, chunk: int | None) -> tuple[Tensor, Any]:
    """Hidden states ``[T, D]`` of the last of the forwards that read ``ids [T]``, and the cache, which has grown."""
    base = language_model(model)
    for piece in ids.split(chunk or len(ids)):
        out = base(input_ids=piece[None], **{CACHE: cache}, use_cache=True)
        cache = cache_of(out)
    return out.last_hidden_state[0], cache


def scored(model: nn.Module, states: Tensor, target: Tensor) -> ForcedAnswer:
    """The answer ``target [A]`` by the hidden states ``[A, D]`` that predict it."""
    head = model.get_output_embeddings()
    rows = max(1, LOGITS // language_model(model).config.vocab_size)
    nll = 0.0
    right = True
    for some, expected in zip(states.split(rows), target.split(rows), strict=True):
        logits = head(some)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        expected = expected.to(logits.device)
        nll += cross_entropy(logits, expected, reduction="sum").item()
        right &= bool((logits.argmax(-1) == expected).all())
    return ForcedAnswer(nll, len(target), right)
