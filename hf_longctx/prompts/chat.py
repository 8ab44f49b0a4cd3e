"""A conversation that goes on from its own cache: each turn reads only the tokens that are new."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer

from ..cache.cache import cache_bytes
from ..cache.finite import check_logits
from ..cache.seam import CACHE
from ..config.config import LongCtxConfig
from ..errors import ConfigError
from ..model.modules import state_of
from ..model.patch import patch_model, unpatch_model
from ..tasks.answer import input_device
from .prompt import as_ids, words
from .prompt_cache import PromptCache
from .template import templated

APART = "\n\n"  # between a document and what is said after it


@dataclass(frozen=True)
class Turn:
    """One answer and what it took.

    Attributes:
        text: the answer, without what ended it.
        tokens: the tokens of the answer, with it.
        read, reused: tokens of the conversation that went through the model before the first of them, and that were in
            the cache.
        nbytes, nbytes_dense: bytes of the KV cache afterwards, and what a dense one holds of as many tokens; both None
            of an answer that was stopped.
        first_s: seconds until the first token was known; None where there was none.
        tokens_per_s: of those after it; None where there was none.
        stopped: whether a Ctrl-C ended it.
    """

    text: str
    tokens: tuple[int, ...]
    read: int
    reused: int
    nbytes: int | None
    nbytes_dense: int | None
    first_s: float | None
    tokens_per_s: float | None
    stopped: bool


class Chat:
    """A conversation with a model, patched or dense.

    With a chat template the conversation is its messages; without one it is plain text, in which every message and
    answer ends a line, and documents stand apart. What a template renders otherwise later on (it may leave out what a
    model thought) is read again from there; the rest stays.

    Args:
        model: a dense model in eval mode; it is patched here.
        config: as for ``patch_model``.
        tokenizer: the model's.
        system: the system message; None: the template's own, if it has one.
        chunk_size: read in pieces of so many tokens while patched; None: in one.
        options: those of ``generate``.

    Attributes:
        ids: tokens of the conversation that are read, the last answer included.
        patched: whether the model is.

    Raises:
        ConfigError: as ``patch_model``, or the chat template refuses the system message.
        UnsupportedModelError, UnsupportedModeError: as ``patch_model``.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: Any = "auto",
        *,
        system: str | None = None,
        chunk_size: int | None = None,
        **options: Any,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.chunk_size = chunk_size
        self.options = options
        processors = LogitsProcessorList([*(options.get("logits_processor") or ()), _NoNan()])
        self._asked = {**options, "logits_processor": processors}
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.reset()
        self._render([*self._messages, {"role": "user", "content": "a"}])  # a template may refuse a system message
        patch_model(model, config)
        self._config: LongCtxConfig = state_of(model).config
        self._prompts = PromptCache(model, tokenizer, chunk_size=chunk_size)

    @property
    def patched(self) -> bool:
        return state_of(self.model) is not None

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._messages: list[dict[str, str]] = list(self._start)
        self._documents: list[str] = []
        self.ids = torch.zeros(0, dtype=torch.int64)
        self._dense: tuple[Tensor, Any] | None = None  # tokens of a dense cache, and that cache
        if hasattr(self, "_prompts"):
            self._prompts.clear()

    def use(self, patched: bool) -> None:
        """Go on patched or dense; the conversation is kept, and read again at the next turn."""
        if patched == self.patched:
            return
        if patched:
            patch_model(self.model, self._config)
        else:
            unpatch_model(self.model)
        self._dense = None
        self._prompts.clear()

    def read(self, document: str | Path) -> int:
        """Put a document into the conversation, before the next message; returns its tokens.

        Patched, it is read now; dense, with the next message.

        Raises:
            ConfigError: the file cannot be read, or is empty.
        """
        try:
            text = Path(document).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{document} cannot be read: {error}") from None
        if not text.strip():
            raise ConfigError(f"{document} is empty.")
        said = [*self._documents, text.strip()]
        # What both begin with does not depend on the message to come.
        one, other = (self._render(self._with(said, message)) for message in ("a", "Z"))
        ids = one[: _common(one, other)]
        if self.patched and len(ids):
            self._prompts.prefill(ids)
        self._documents = said
        return len(words(self.tokenizer, text.strip(), add_special_tokens=False))

    def say(self, message: str, show: Callable[[str], None] = lambda text: None) -> Turn:
        """The answer to a message.

        A Ctrl-C while it is read takes the message back and goes on as KeyboardInterrupt; one during the answer ends
        the answer, which stays in the conversation as far as it came.

        Args:
            show: gets the answer's text, piece by piece.

        Raises:
            ConfigError: the chat template refuses the conversation, or the model's logits are NaN.
        """
        messages = self._with(self._documents, message)
        ids = self._render(messages)
        live = _Live(self.tokenizer, show)
        reused, held, whole = (self._ask_patched if self.patched else self._ask_dense)(ids, live)
        tokens = live.tokens if whole is None else whole[len(ids) :].tolist()
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        self._messages = [*messages, {"role": "assistant", "content": text}]
        self._documents = []
        self.ids = torch.cat([ids, torch.tensor(tokens, dtype=torch.int64)])
        nbytes = (None, None) if held is None else held
        return Turn(text, tuple(tokens), len(ids) - reused, reused, *nbytes, *live.speed(), whole is None)

    def _ask_patched(self, ids: Tensor, live: _Live) -> tuple[int, tuple[int, int] | None, Tensor | None]:
        """(tokens reused, bytes held and dense ones, all tokens); None twice where a Ctrl-C ended the answer."""
        before = self._prompts.tokens_reused
        prompt = self._prompts.prefill(ids)
        reused = self._prompts.tokens_reused - before
        try:
            _, done = prompt.generate((), return_handle=True, streamer=live, **self._asked)
        except KeyboardInterrupt:
            self._keep(prompt)
            return reused, None, _unless_silent(live)
        # A template may render the answer otherwise at the next turn, which then goes on from before it.
        self._keep(prompt, done)
        return reused, (done.nbytes, done.cache.nbytes_dense), done.ids

    def _keep(self, *prompts: Any) -> None:
        """Only these are worth their memory: a chat goes on from where it is."""
        self._prompts.clear()
        for prompt in prompts:
            self._prompts.add(prompt)

    def _ask_dense(self, ids: Tensor, live: _Live) -> tuple[int, tuple[int, int] | None, Tensor | None]:
        """As ``_ask_patched``, with Transformers' own cache, which goes on where the conversation begins with it."""
        past = self._dense
        self._dense = None  # after a Ctrl-C nobody knows what it holds
        if past is not None and not (len(past[0]) < len(ids) and torch.equal(past[0], ids[: len(past[0])])):
            past = None
        given = ids[None].to(input_device(self.model))
        cache = {} if past is None else {CACHE: past[1]}
        try:
            out = self.model.generate(
                given,
                attention_mask=torch.ones_like(given),
                streamer=live,
                return_dict_in_generate=True,
                **cache,
                **self._asked,
            )
        except KeyboardInterrupt:
            return 0 if past is None else len(past[0]), None, _unless_silent(live)
        whole = out.sequences[0].cpu()
        self._dense = (whole[:-1], out[CACHE])
        held = cache_bytes(out[CACHE])
        return 0 if past is None else len(past[0]), (held, held), whole

    def _with(self, documents: list[str], message: str) -> list[dict[str, str]]:
        """The messages with one more of the user's, which begins with the documents."""
        return [*self._messages, {"role": "user", "content": APART.join([*documents, message])}]

    def _render(self, messages: list[dict[str, str]]) -> Tensor:
        """Token ids ``[T]`` of the conversation, up to where the answer begins."""
        if not getattr(self.tokenizer, "chat_template", None):
            return as_ids(words(self.tokenizer, "".join(f"{one['content']}\n" for one in messages)))
        text = templated(self.tokenizer, messages, tokenize=False)
        return as_ids(words(self.tokenizer, text, add_special_tokens=False))


class _NoNan(LogitsProcessor):
    """Ends an answer with an error where there is none: sampling would fail, and the greedy choice is token 0."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_logits(scores)
        return scores


class _Live(TextStreamer):
    """Shows an answer as it comes, and notes its tokens and when they came."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show
        self.tokens: list[int] = []
        self.start = time.perf_counter()
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.tokens += value.flatten().tolist()
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)

    def speed(self) -> tuple[float | None, float | None]:
        """(seconds until the first token, tokens per second after it)."""
        if not self.times:
            return None, None
        after = self.times[-1] - self.times[0]
        return self.times[0] - self.start, (len(self.times) - 1) / after if after else None


def _unless_silent(live: _Live) -> None:
    """Raise the Ctrl-C again that came before the first token: there is no answer to keep."""
    if not live.tokens:
        raise
    live.end()


def _common(one: Tensor, other: Tensor) -> int:
    """Tokens that both begin with."""
    size = min(len(one), len(other))
    differs = (one[:size] != other[:size]).nonzero()
    return int(differs[0]) if len(differs) else size
