"""PromptCache: prompts that were read once, kept for whoever asks next, within a limit of bytes."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..cache.bytes import storage_bytes
from ..cache.cache import LongCtxCache
from ..config.words import spec_word
from ..errors import ConfigError, UnsupportedModeError
from ..eviction.base import Asked
from ..layout.prompt_learning import refuse_prompt_learning
from ..stores.base import SLACK
from .prompt import Prompt, Text, as_ids, words
from .template import templated

LEAST = SLACK + 1  # tokens that a beginning two prompts share must have to be kept for a third one

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a prompt goes on from.

    Attributes:
        near: the stored prompt of which the most tokens can be reused; None: there is none.
        common: how many.
        parts: tokens after which it parts from the stored prompt that begins most like it, reusable or not.
    """

    near: Prompt | None
    common: int
    parts: int


class PromptCache:
    """Reads prompts, and starts each from the longest beginning that it has read before.

    Where that beginning cannot be reused, because streaming heads cannot go back to it, it is stored as well once a
    second prompt has it, so that a third one starts there.

    Threads may share it, and the model. Handles that were given out keep their memory when the table drops a prompt,
    so the limit is one of the table alone. After a change of the model's weights or adapters call `clear`; prompts
    of another config are dropped by themselves.

    Where retrieval heads evict tokens by a score that does not look for a question (``key_norm``,
    ``expected_attention``, ``kvzip`` and others that are ``agnostic``), that happens once, where the prompt is read:
    all its questions go on from what is left, and a prompt that begins alike reuses it as a whole or not at all. By
    other scores (``snapkv``, ``tova``) the prompt is kept whole, and every question evicts on a fork of its own.

    Args:
        model: a patched model in eval mode.
        tokenizer: for words and messages; None: token ids only.
        max_bytes: limit of `nbytes`; the least recently used prompts go first. None: no limit.
        chunk_size: read prompts in pieces of so many tokens; None: in one.

    Attributes:
        hits, misses: prompts of which something, or nothing, had been read.
        tokens_reused, tokens_read: their tokens that were taken from the table, and that went through the model.
        evicted: prompts that were dropped for the limit.

    Raises:
        UnsupportedModelError: the model is not patched.
        UnsupportedModeError: the model has prompt learning (PEFT).
        ConfigError: a number out of bounds, or the config's score asks the model in words and there is no tokenizer.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, *, max_bytes: int | None = None, chunk_size: int | None = None
    ):
        for name, number in (("max_bytes", max_bytes), ("chunk_size", chunk_size)):
            if number is not None and (type(number) is not int or number < 1):
                raise ConfigError(f"{name}: got {number!r}, expected a whole number from 1, or None.")
        rule = LongCtxCache(model).rule  # refuses a model that is not patched
        if isinstance(rule, Asked) and rule.agnostic and rule.needs_tokenizer and tokenizer is None:
            raise ConfigError(
                f"tokenizer: got none, and score {spec_word(rule)!r} of the config asks the model in words. Give the "
                "model's tokenizer, or set words: false in the score."
            )
        refuse_prompt_learning(model)
        self.model = model
        self.tokenizer = tokenizer
        self.max_bytes = max_bytes
        self.chunk_size = chunk_size
        self.hits = self.misses = self.tokens_read = self.tokens_reused = self.evicted = 0
        self._lock = threading.Lock()  # of the table and the counters; never held while the model runs
        self._table: OrderedDict[bytes, Prompt] = OrderedDict()  # token ids -> prompt, the latest used last
        self._reading: dict[bytes, Future[Prompt | None]] = {}

    def __len__(self) -> int:
        """Prompts in the table."""
        return len(self._table)

    def __repr__(self) -> str:
        used = f"hits: {self.hits}, misses: {self.misses}, tokens reused: {self.tokens_reused}"
        return f"PromptCache(prompts: {len(self)}, {self.nbytes / 1e6:.2f} MB, {used})"

    @property
    def nbytes(self) -> int:
        """Bytes of memory behind all prompts of the table; what they share counts once."""
        with self._lock:
            return self._nbytes()

    def clear(self) -> None:
        """Drop every prompt."""
        with self._lock:
            self._table.clear()

    def prefill(
        self, prompt: Text | Sequence[Mapping[str, Any]], *, stop: Callable[[], bool] | None = None, **template: Any
    ) -> Prompt:
        """Read a prompt, or what of it was not read before, and keep it for the next.

        Of a stored prompt that begins alike the common part is reused where it is the whole of it, or where its
        streaming heads can still go back to it. A thread that asks for what another one is reading waits for that.

        Args:
            prompt: words, token ids, or the messages of a chat.
            stop: asked before every piece of `chunk_size` tokens. Where it says True the reading ends: what was read is
                kept, and the handle is of that beginning alone.
            template: arguments of the chat template, by default ``add_generation_prompt=True``; None for words and ids.

        Raises:
            ConfigError: nothing was given, words without a tokenizer, or messages that no chat template takes.
            UnsupportedModeError: the model is in training mode, or has prompt learning (PEFT).
        """
        if self.model.training:
            raise UnsupportedModeError("PromptCache needs the model in eval mode: call model.eval() first.")
        refuse_prompt_learning(self.model)  # such an adapter may have been activated since
        ids = self._ids(prompt, template)
        key = ids.numpy().tobytes()
        empty = LongCtxCache(self.model)
        while True:
            with self._lock:
                self._drop_other_configs(empty.plans)
                if (stored := self._table.get(key)) is not None:
                    self._table.move_to_end(key)
                elif (other := self._reading.get(key)) is None:
                    self._reading[key] = future = Future()
                    start = self._nearest(ids)
            if stored is None and other is None:
                cache = empty if start.near is None else start.near.cache.fork()
                return self._read(ids, key, cache, start, future, stop)
            if (found := stored or other.result()) is not None:  # None: that thread failed, or was stopped
                with self._lock:
                    self.hits += 1
                    self.tokens_reused += found.cache.seen
                return found.fork()

    def add(self, prompt: Prompt, *, after: Prompt | None = None) -> None:
        """Keep a prompt made elsewhere: the handle that ``generate(return_handle=True)`` gave, for a chat's next turn.

        A prompt that is larger than the limit by itself is not kept, and that is logged.

        Args:
            after: the prompt that it answers. Of what else the chat began with only the first prompt stays, and what
                another stored prompt begins with too.
        """
        own = prompt.fork()
        with self._lock:
            self._store(own.ids.numpy().tobytes(), own)
            if after is not None:
                self._drop_turns(own.ids, len(after.ids))

    def _read(
        self,
        ids: Tensor,
        key: bytes,
        cache: LongCtxCache,
        start: Start,
        future: Future,
        stop: Callable[[], bool] | None,
    ) -> Prompt:
        ready = None
        try:
            if cache.seen > start.common:
                cache.crop(start.common)
            done = Prompt(self.model, self.tokenizer, ids, cache)
            cache.reopen(len(ids) - 1 - cache.seen)
            new = 0
            if start.parts - start.common >= LEAST:
                shared = Prompt(self.model, self.tokenizer, ids[: start.parts + 1], cache)
                new = shared.catch_up(self.chunk_size, stop)
                self._keep_beginning(done)
            new += done.catch_up(self.chunk_size, stop)
            self._count(start.common, new)
            if cache.seen < len(ids) - 1:
                return self._keep_beginning(done)
            cache.settle()  # once, for all that go on from here
            if new:
                cache.end_document(self.tokenizer)
            handle = done.fork()
            with self._lock:
                self._store(key, done)
            ready = done
            return handle
        finally:
            with self._lock:
                del self._reading[key]
            future.set_result(ready)

    def _keep_beginning(self, prompt: Prompt) -> Prompt:
        """Store what was read of a prompt so far; returns a handle of it.

        Not where the config evicts tokens when a prompt was read: that has not come to its end.
        """
        part = Prompt(self.model, self.tokenizer, prompt.ids[: prompt.cache.seen + 1], prompt.cache.fork())
        part.cache.settle()
        rule = part.cache.rule
        if part.cache.seen and (rule is None or not rule.agnostic):
            with self._lock:
                self._store(part.ids.numpy().tobytes(), part)
        return part.fork()

    def _count(self, common: int, new: int) -> None:
        with self._lock:
            self.hits += common > 0
            self.misses += common == 0
            self.tokens_read += new
            self.tokens_reused += common

    def _drop_turns(self, ids: Tensor, last: int) -> None:
        """Drop stored beginnings of ``ids`` but for the first, that of ``last`` tokens, and what others begin with."""
        chain = {key: one for key, one in self._table.items() if _begins(ids, one.ids)}
        others = [one for key, one in self._table.items() if key not in chain]
        for key in sorted(chain, key=len)[1:]:
            if len(chain[key]) in (last, len(ids)):
                continue
            if not any(_begins(other.ids, chain[key].ids) for other in others):
                del self._table[key]

    def _nearest(self, ids: Tensor) -> Start:
        """What the prompt goes on from; the latest used of equals."""
        best = None
        key = None
        most = 0
        parts = 0
        for name, stored in reversed(self._table.items()):
            shorter = min(len(ids), len(stored.ids))
            differs = (ids[:shorter] != stored.ids[:shorter]).nonzero()
            common = min(int(differs[0]) if len(differs) else shorter, len(ids) - 1, stored.cache.seen)
            parts = max(parts, common)
            possible = common == stored.cache.seen or common >= stored.cache.oldest_crop
            if possible and common > most:
                best = stored
                key = name
                most = common
        if key is not None:
            self._table.move_to_end(key)
        return Start(best, most, parts)

    def _store(self, key: bytes, prompt: Prompt) -> None:
        if self.max_bytes is not None and prompt.nbytes > self.max_bytes:
            logger.warning(
                "a prompt of %d tokens holds %d bytes, more than max_bytes=%d: it is served but not kept",
                *(len(prompt), prompt.nbytes, self.max_bytes),
            )
            return
        self._table[key] = prompt
        self._table.move_to_end(key)
        while self.max_bytes is not None and self._nbytes() > self.max_bytes:
            self._table.popitem(last=False)
            self.evicted += 1

    def _nbytes(self) -> int:
        caches = [prompt.cache for prompt in self._table.values()]
        return storage_bytes(tensor for cache in caches for tensor in cache.tensors())

    def _drop_other_configs(self, plans: tuple) -> None:
        for key in [key for key, prompt in self._table.items() if prompt.cache.plans != plans]:
            del self._table[key]

    def _ids(self, prompt: Any, template: dict) -> Tensor:
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            text = templated(self.tokenizer, prompt, **{**template, "tokenize": False})
            ids = as_ids(words(self.tokenizer, text, add_special_tokens=False))
        elif template:
            raise ConfigError(f"{', '.join(template)}: arguments of a chat template, but the prompt is no chat.")
        else:
            ids = as_ids(words(self.tokenizer, prompt) if isinstance(prompt, str) else prompt)
        if not len(ids):
            raise ConfigError("prompt: got nothing to read, expected at least one token.")
        return ids


def _begins(ids: Tensor, beginning: Tensor) -> bool:
    """Whether ``ids`` begins with ``beginning``."""
    return len(beginning) <= len(ids) and bool((ids[: len(beginning)] == beginning).all())
