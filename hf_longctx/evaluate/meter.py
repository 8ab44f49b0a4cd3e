"""What one variant does on one case: its answers, what they cost, and how it predicts along given answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..cache.cache import cache_bytes
from ..tasks.answer import Reader, ask_all, input_device
from ..tasks.base import Sample
from ..tasks.forced import ForcedAnswer, expected
from .forwards import follow_answer, now


@dataclass(frozen=True)
class Costs:
    """What answering a sample took.

    Attributes:
        cache_bytes: bytes that the cache really held once the context was read.
        prefill_s: seconds to read the context and the first question, until the first token is known.
        decode_ms: milliseconds per token after the first of each answer; None where none is decoded.
    """

    cache_bytes: int
    prefill_s: float
    decode_ms: float | None


class Meter(Reader):
    """A reader that notes how many tokens it was given at once and how long it took; copies note in the same list."""

    def __init__(self, model: nn.Module, stop: Sequence[int], chunk: int | None):
        super().__init__(model, stop)
        self.chunk = chunk
        self.noted: list[tuple[int, float]] = []

    def read(self, ids: Sequence[int] | np.ndarray) -> int:
        device = input_device(self.model)
        start = now(device)
        step = self.chunk or len(ids)
        for begin in range(0, len(ids), step):
            token = super().read(ids[begin : begin + step])
        self.noted.append((len(ids), now(device) - start))
        return token

    def costs(self, held: int) -> Costs:
        """Of a context, the first thing read, and all answers after it."""
        decoded = [took for tokens, took in self.noted[2:] if tokens == 1]
        prefill = sum(took for _, took in self.noted[:2])
        return Costs(held, prefill, 1000 * sum(decoded) / len(decoded) if decoded else None)


@dataclass(frozen=True)
class Found:
    """What a sample showed of one variant.

    Attributes:
        said: token ids of the decoded answers; None where nothing is decoded.
        costs: of reading and answering.
        expected: how likely each expected answer is.
        states: hidden states ``[P, D]`` along the given answers, or where nothing is decoded logits ``[P, V]`` along
            the expected ones.
    """

    said: list[list[int]] | None
    costs: Costs
    expected: list[ForcedAnswer]
    states: Tensor


@torch.no_grad()
def forced_of(model: nn.Module, sample: Sample, mode: str, chunk: int | None) -> Found:
    """The expected answers alone, nothing decoded; their logits are the states."""
    device = input_device(model)
    meter = Meter(model, sample.stop, chunk)
    meter.read(sample.context)
    held = cache_bytes(meter.cache)
    start = now(device)
    first = None
    answers = []
    logits = []
    for answer, states in expected(model, sample, meter.cache, mode):
        first = now(device) if first is None else first
        answers.append(answer)
        logits.append(states)
    return Found(None, Costs(held, meter.noted[0][1] + first - start, None), answers, torch.cat(logits))


@torch.no_grad()
def answers_of(
    model: nn.Module, sample: Sample, mode: str, chunk: int | None, along: Sequence[Sequence[int]] | None = None
) -> Found:
    """The greedy answers, how likely the expected ones are, and hidden states that predict the answers ``along`` and
    what follows each.

    The hidden states need a copy of the context's cache, so two of them are in memory for a while; of several
    "requests" each is a copy anyway.

    Args:
        along: token ids of the answers that the hidden states follow; None: the model's own.
    """
    meter = Meter(model, sample.stop, chunk)
    meter.read(sample.context)
    held = cache_bytes(meter.cache)
    once = mode == "turns" or len(sample.questions) == 1  # the questions are asked of the cache itself
    spare = meter.copy() if once else meter
    said = ask_all(meter, sample, mode)
    if once:
        meter.cache = None
    likely = [one for one, _ in expected(model, sample, spare.copy().cache, mode)]
    states = []
    for i, (question, answer) in enumerate(zip(sample.questions, said if along is None else along, strict=True)):
        cache = spare.cache if once else spare.copy().cache
        prompt = [*(sample.between if once and i else ()), *question.prompt.tolist()]
        ids = (torch.tensor(list(some), dtype=torch.int64, device=input_device(model)) for some in (prompt, answer))
        states.append(follow_answer(model, cache, *ids))
    return Found(said, meter.costs(held), likely, torch.cat(states))
