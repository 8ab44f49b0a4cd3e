"""What evaluation makes a model do, dense or patched alike: answer, predict along a given text, read a long text."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.cache import cache_bytes
from ..cache.eviction import tell_prompt
from ..cache.seam import CACHE, cache_of
from ..config.model import made_for
from ..errors import ConfigError
from ..model.losses import losses_of
from ..model.modules import language_model
from ..model.output_head import output_head
from ..tasks.answer import input_device
from .measures import Perplexity

STEP = 64  # tokens of a given answer per forward: too few for a prefill pattern, so they are read as in decoding


@dataclass(frozen=True)
class Answer:
    """What one greedy generation gave.

    Attributes:
        tokens: the new tokens, the one that ended the answer included.
        cache_bytes: bytes the cache really held once the prompt was read.
        prefill_s: seconds until the first token was known.
        decode_ms: milliseconds for each token after it; None where there is none.
    """

    tokens: tuple[int, ...]
    cache_bytes: int
    prefill_s: float
    decode_ms: float | None


@torch.no_grad()
def greedy(model: nn.Module, ids: Tensor, most: int, stop: Collection[int] = (), chunk: int | None = None) -> Answer:
    """Answer a prompt with the most likely token each time, whatever the generation_config says.

    Args:
        ids: the prompt ``[1, T]``.
        most: new tokens at most.
        stop: tokens that end the answer.
        chunk: tokens of the prompt per forward; None for all of them at once.
    """
    start = now(ids.device)
    out, cache = _read_prompt(model, ids, chunk, logits_to_keep=1)
    tokens = [int(out.logits[0, -1].argmax())]
    read = now(ids.device)
    held = cache_bytes(cache)
    first = time.perf_counter()
    _decode(model, cache, tokens, most, stop)
    decoded = 1000 * (now(ids.device) - first) / (len(tokens) - 1) if len(tokens) > 1 else None
    return Answer(tuple(tokens), held, read - start, decoded)


def _read_prompt(
    model: nn.Module, ids: Tensor, chunk: int | None, each: Callable[[Any], None] | None = None, **more: Any
) -> tuple[Any, Any]:
    """Read the prompt ``ids [1, T]``, which has ended then: (output of the last forward, cache).

    Args:
        each: called with every forward's output.
        more: arguments of every forward.
    """
    cache = None
    for piece in ids.split(chunk or ids.shape[1], 1):
        out = model(input_ids=piece, **{CACHE: cache}, use_cache=True, **more)
        cache = cache_of(out)
        tell_prompt(cache, ended=False)
        if each is not None:
            each(out)
    tell_prompt(cache, ended=True)
    return out, cache


def _decode(model: nn.Module, cache: Any, tokens: list[int], most: int, stop: Collection[int]) -> None:
    """Go on from the first of the answer's ``tokens``, which the cache lacks."""
    device = input_device(model)
    while len(tokens) < most and tokens[-1] not in stop:
        last = torch.tensor([tokens[-1:]], device=device)
        out = model(input_ids=last, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        tokens.append(int(out.logits[0, -1].argmax()))


@torch.no_grad()
def answer_along(
    model: nn.Module,
    head: Callable[[Tensor], Tensor],
    ids: Tensor,
    most: int,
    stop: Collection[int],
    chunk: int | None,
    along: Tensor | None,
) -> tuple[list[int], int, Tensor]:
    """(the greedy answer, bytes of the cache once the prompt was read, hidden states ``[A, D]`` that predict another).

    The prompt is read once, as ``greedy`` reads it; for a while there are two copies of its cache.

    Args:
        head: as ``output_head`` gives it.
        along: the answer ``[A]`` that the hidden states follow; None: the greedy one.
    """
    out, cache = _read_prompt(language_model(model), ids, chunk)
    state = out.last_hidden_state[0, -1:].clone()
    held = cache_bytes(cache)
    tokens = [int(head(state)[0].argmax())]
    spare = copy.deepcopy(cache)
    _decode(model, cache, tokens, most, stop)
    along = ids.new_tensor(tokens) if along is None else along
    return tokens, held, torch.cat([state, follow(model, spare, along[:-1])]) if len(along) > 1 else state


@torch.no_grad()
def forced(model: nn.Module, ids: Tensor, answer: Tensor, last: int, chunk: int | None = None) -> Tensor:
    """Hidden states ``[last + A, D]`` that predict the prompt's last ``last`` tokens, then the ``answer [A]``.

    The prompt ``ids [1, T]`` (``last < T``) is read as ``greedy`` reads it, and the answer from the cache.
    """
    tail: list[Tensor] = []

    def keep(out: Any) -> None:
        tail[:] = [torch.cat([*tail, out.last_hidden_state[0]])[-last - 1 :].clone()]

    _, cache = _read_prompt(language_model(model), ids, chunk, keep)
    return torch.cat([*tail, follow(model, cache, answer[:-1])]) if len(answer) > 1 else tail[0]


@torch.no_grad()
def follow(model: nn.Module, cache: Any, ids: Tensor) -> Tensor:
    """Hidden states ``[T, D]`` of tokens ``ids [T]`` that come after those in the cache, which grows."""
    base = language_model(model)
    pieces = (base(input_ids=piece[None], **{CACHE: cache}, use_cache=True) for piece in ids.split(STEP))
    return torch.cat([out.last_hidden_state[0] for out in pieces])


def follow_answer(model: nn.Module, cache: Any, prompt: Tensor, answer: Tensor) -> Tensor:
    """As `follow`, of the tokens ``prompt [T]`` and ``answer [A]``, from the last of the prompt on: ``[1 + A, D]``."""
    if not getattr(cache, "evicts", False):
        return follow(model, cache, torch.cat([prompt, answer]))[len(prompt) - 1 :]
    tell_prompt(cache, ended=False)
    states = follow(model, cache, prompt)[-1:]
    tell_prompt(cache, ended=True)
    return torch.cat([states, follow(model, cache, answer)]) if len(answer) else states


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, *, window: int | None = None, context: int | None = None) -> Perplexity:
    """Perplexity of a text, read in windows that overlap, every token but the first scored once.

    Args:
        ids: the text ``[T]``, special tokens included.
        window: tokens per forward; default: what the model was made for, or the text's length.
        context: tokens of its window before each scored token, at least, or all the text has before it; default: half
            the window. With ``window - context`` tokens scored per forward, a longer context takes more forwards.

    Raises:
        ConfigError: the text has no token to score, or window and context do not fit each other.
        UnsupportedModelError: as ``output_head``.

    As in Transformers' page on the perplexity of fixed-length models, whose stride is ``window - context``.
    """
    if ids.dim() != 1 or len(ids) < 2:
        raise ConfigError(f"text: got token ids of shape {tuple(ids.shape)}, expected [T] with at least 2 tokens.")
    if window is None:
        window = min(len(ids), made_for(language_model(model).config) or len(ids))
    context = window // 2 if context is None else context
    if not 1 <= context < window:
        raise ConfigError(f"context must be at least 1 and less than window={window} tokens, given {context}.")
    head = output_head(model)
    ids = ids.to(input_device(model))
    parts = (window_losses(model, head, ids, *one).sum().item() for one in windows(len(ids), window, context))
    return Perplexity(sum(parts), len(ids) - 1)


@torch.no_grad()
def window_losses(
    model: nn.Module, head: Callable[[Tensor], Tensor], ids: Tensor, begin: int, scored: int, end: int
) -> Tensor:
    """The negative log-likelihoods, in nats, float64, of ``ids[scored:end]``, read from ``begin`` on.

    ``head``: as ``output_head`` gives it.
    """
    hidden = language_model(model)(input_ids=ids[None, begin:end], use_cache=False).last_hidden_state[0]
    return losses_along(model, head, hidden[scored - begin - 1 : -1], ids[scored:end])


@torch.no_grad()
def losses_along(model: nn.Module, head: Callable[[Tensor], Tensor], states: Tensor, ids: Tensor) -> Tensor:
    """The negative log-likelihoods ``[A]``, in nats, of ``ids [A]``, which hidden states ``[A, D]`` predict.

    They are in float64 on the CPU, to be summed.

    ``head``: as ``output_head`` gives it.
    """
    return losses_of(head, states, ids, language_model(model).config.vocab_size).cpu().double()


def windows(tokens: int, window: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first scored, end) of every window of a text, as token positions."""
    begin = 0
    scored = 1
    while scored < tokens:
        end = min(begin + window, tokens)
        yield begin, scored, end
        begin = begin + window - context
        scored = end


def now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
