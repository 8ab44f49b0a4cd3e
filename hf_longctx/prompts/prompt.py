"""A prompt that was read once, and what is asked about it: every answer goes on from shared memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.cache import LongCtxCache
from ..cache.seam import CACHE, NAMES
from ..errors import CacheError, ConfigError
from ..tasks.answer import input_device

Text = str | Sequence[int] | Tensor  # words, or token ids

FORMS = "Give one text, or the ids of one text; ask() takes a list of them."

# Arguments of generate() that a prompt sets itself, or that would make its result another thing.
OWN = ("input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids", "use_cache", *NAMES)
OWN += ("cache_implementation", "prefill_chunk_size", "return_dict_in_generate", "token_healing")
# Transformers takes no batch with these.
ONE_ROW = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "streamer")
# What of the first may stand in a generation config -> the values there that change nothing.
STORED = {
    "use_cache": (None, True),
    "cache_implementation": (None, "dynamic_full", "dynamic"),
    "prefill_chunk_size": (None,),
    "token_healing": (None, False),
}


class Prompt:
    """What a model has read, to be asked about; made by ``PromptCache.prefill``.

    Nothing it is asked changes it: every answer is a continuation of its own. Its memory lives as long as it, or any
    fork of it, also when its ``PromptCache`` has dropped it.

    Attributes:
        ids: its tokens, int64 ``[T]`` on the CPU.
        cache: one row that holds them but for the last, which the next forward reads (as after ``generate``). For a
            ``generate`` of your own take that of a `fork`, and give the whole text as ``input_ids``.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, ids: Tensor, cache: LongCtxCache):
        self.model = model
        self.tokenizer = tokenizer
        self.ids = ids
        self.cache = cache

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Prompt({len(self)} tokens, {self.nbytes / 1e6:.2f} MB)"

    @property
    def nbytes(self) -> int:
        """Bytes that its cache holds, those that it shares included."""
        return self.cache.nbytes

    def fork(self) -> Prompt:
        """The same prompt with a cache of its own, in which what retrieval heads keep is shared, not copied."""
        return Prompt(self.model, self.tokenizer, self.ids, self.cache.fork())

    @torch.no_grad()
    def catch_up(self, chunk_size: int | None = None, stop: Callable[[], bool] | None = None) -> int:
        """Read the tokens that the cache lacks, but for the last, in pieces; returns how many.

        Args:
            stop: asked before every piece; the reading ends where it says True.
        """
        before = self.cache.seen
        new = self.ids[before:-1]
        for piece in new.split(chunk_size or max(1, len(new))):
            if not len(piece) or (stop is not None and stop()):
                break
            given = piece[None].to(input_device(self.model))
            self.model(given, **{CACHE: self.cache}, use_cache=True, logits_to_keep=1)
        return self.cache.seen - before

    def generate(self, text: Text = "", *, return_handle: bool = False, **kwargs: Any) -> Any:
        """The answer to one text that follows the prompt.

        Args:
            text: appended as it is, without special tokens; or token ids.
            return_handle: also return a prompt that goes on after the answer, for the next turn.
            kwargs: those of ``model.generate``.

        Returns:
            The answer's words, or its token ids where ``text`` is token ids or there is no tokenizer, without what
            ended it; a list of answers with ``num_return_sequences`` above 1. With ``return_handle``: (answer, prompt).

        Raises:
            ConfigError: an argument that the prompt sets itself, or a handle of several answers.
        """
        if not return_handle:
            return self.ask([text], **kwargs)[0]
        self._check(kwargs)
        if self._expand(kwargs) > 1:
            raise ConfigError("return_handle: with beams or several sequences there is no single cache to go on from.")
        ids = self.tokens(text)
        cache = self.cache.fork()
        new = self._run([ids], cache, kwargs)[0]
        whole = torch.cat([self.ids, ids, torch.tensor(new, dtype=torch.int64)])
        if cache.seen >= len(whole):
            cache.crop(len(whole) - 1)
        return self._said(text, new, kwargs), Prompt(self.model, self.tokenizer, whole, cache)

    def ask(self, questions: Sequence[Text], *, batch_size: int = 8, **kwargs: Any) -> list:
        """Answers to many questions about the prompt, in their order; see `generate` for what one is.

        Up to ``batch_size`` of them are read and answered at once over one copy of the prompt, each costing only its
        own tokens and rings. Their lengths may differ by as many tokens as streaming heads can take back (255); where
        a store cannot, or a config has a dense tail, by none.
        """
        self._check(kwargs)
        if isinstance(questions, str | Tensor):
            raise ConfigError("questions: expected a list of texts. For one text use generate().")
        if type(batch_size) is not int or batch_size < 1:
            raise ConfigError(f"batch_size: got {batch_size!r}, expected a whole number from 1.")
        if any(self._option(name, kwargs) for name in ONE_ROW):
            batch_size = 1
        texts = [self.tokens(text) for text in questions]
        answers: list[Any] = [None] * len(texts)
        room = self._room() if self.cache.seen else max(map(len, texts), default=0)
        each = int(self._option("num_return_sequences", kwargs) or 1)
        for group in groups(list(map(len, texts)), room, batch_size):
            new = self._run([texts[i] for i in group], self.cache.fork(), kwargs)
            for place, i in enumerate(group):
                said = [self._said(questions[i], row, kwargs) for row in new[place * each : (place + 1) * each]]
                answers[i] = said if each > 1 else said[0]
        return answers

    def _room(self) -> int:
        """By how many tokens questions that are read together may differ.

        Tokens that are taken back are read again with the question. Those of a dense tail would see less of the prompt.
        """
        tails = any(role.dense_tail for plan in self.cache.plans for role in plan.filled)
        return 0 if tails else self.cache.stagger_room

    def tokens(self, text: Text) -> Tensor:
        """Token ids ``[T]`` of a text that follows the prompt.

        Raises:
            ConfigError: words without a tokenizer.
        """
        if isinstance(text, str) and text:
            return as_ids(words(self.tokenizer, text, add_special_tokens=False))
        return as_ids(() if isinstance(text, str) else text)

    def _run(self, texts: list[Tensor], cache: LongCtxCache, kwargs: dict) -> list[list[int]]:
        """The new tokens of every text and sequence, up to the longest; ``cache`` goes on with them."""
        wholes = [torch.cat([self.ids, text]) for text in texts]
        width = max(map(len, wholes))
        expand = self._expand(kwargs)
        pads = [width - len(whole) for whole in wholes]
        # Pads are the text's own first token, so that penalties for what was said before find nothing new in them.
        ids = torch.stack([torch.cat([one[:1].expand(pad), one]) for one, pad in zip(wholes, pads, strict=True)])
        mask = torch.arange(width) >= torch.tensor(pads)[:, None]
        if cache.seen:
            if len(texts) > 1:
                cache.batch_repeat_interleave(len(texts))
                cache.stagger(pads)
            if expand > 1:
                cache.batch_repeat_interleave(expand)
        if self._option("stop_strings", kwargs) is not None:
            kwargs = {"tokenizer": self.tokenizer, **kwargs}
        if self._option("cache_implementation", kwargs) is not None:
            kwargs = {**kwargs, "cache_implementation": None}  # Transformers takes no word beside a cache
        device = input_device(self.model)
        given = {"attention_mask": mask.long().to(device), CACHE: cache}
        out = self.model.generate(ids.to(device), **given, **kwargs)
        return getattr(out, "sequences", out)[:, width:].tolist()  # of a dict, where a generation config asks for one

    def _said(self, text: Text, row: list[int], kwargs: dict) -> str | list[int]:
        """One answer, without the token that ended it and the pads behind it."""
        eos = self._option("eos_token_id", kwargs)
        stops = set() if eos is None else {int(token) for token in torch.as_tensor(eos).flatten()}
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        said = row[:end]
        if self._option("stop_strings", kwargs) is not None or kwargs.get("stopping_criteria") is not None:
            pad = self._option("pad_token_id", kwargs)  # a row that such a rule ended earlier than its neighbours
            while said and said[-1] == pad:
                said.pop()
        if self.tokenizer is None or not isinstance(text, str):
            return said
        return self.tokenizer.decode(said, skip_special_tokens=True)

    def _expand(self, kwargs: dict) -> int:
        """Rows that generate() makes of one."""
        return max(int(self._option(name, kwargs) or 1) for name in ("num_beams", "num_return_sequences"))

    def _option(self, name: str, kwargs: dict) -> Any:
        """An argument of generate(), or what the generation configs say where it is not given."""
        given = (kwargs.get(name), *(getattr(config, name, None) for _, config in self._configs(kwargs)))
        return next((value for value in given if value is not None), None)

    def _configs(self, kwargs: dict) -> list[tuple[str, Any]]:
        """The generation configs, the first one first, and what they are called."""
        stored = getattr(self.model, "generation_config", None)
        return [("generation_config", kwargs.get("generation_config")), ("model.generation_config", stored)]

    def _check(self, kwargs: dict) -> None:
        own = [name for name in OWN if name in kwargs]
        if own:
            raise ConfigError(
                f"{', '.join(own)}: a prompt sets this itself. For a generate() of your own take fork().cache and give "
                "the whole text as input_ids."
            )
        for name, harmless in STORED.items():
            found = ((place, getattr(config, name, None)) for place, config in self._configs(kwargs))
            place, value = next(((place, value) for place, value in found if value is not None), ("", None))
            if value not in harmless:
                raise ConfigError(
                    f"{place}.{name}={value!r}: a prompt brings its own cache and has read its text, so this cannot be "
                    f"done. Set {place}.{name} to {harmless[-1]!r} for this call."
                )
        if not len(self.ids) > self.cache.seen:
            raise CacheError(
                f"this prompt has {len(self.ids)} tokens, its cache has read {self.cache.seen}: somebody went on with "
                "the cache. Ask before that, or take the cache of a fork()."
            )


def groups(lengths: list[int], room: int, size: int) -> list[list[int]]:
    """Indices of texts to be read together: at most ``size`` of them, whose lengths differ by at most ``room``."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if found and len(found[-1]) < size and lengths[i] - lengths[found[-1][0]] <= room:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def words(tokenizer: Any, text: str, **kwargs: Any) -> list[int]:
    """Token ids of a text.

    Raises:
        ConfigError: there is no tokenizer.
    """
    if tokenizer is None:
        raise ConfigError("a text was given, but the PromptCache has no tokenizer. Give it one, or give token ids.")
    return tokenizer(text, **kwargs)["input_ids"]


def as_ids(ids: Sequence[int] | Tensor) -> Tensor:
    """Token ids as int64 ``[T]`` on the CPU; one row ``[1, T]`` is taken as well.

    Raises:
        ConfigError: they are no whole numbers, or several rows.
    """
    try:
        given = torch.as_tensor(ids)
    except (ValueError, TypeError, RuntimeError):
        raise ConfigError(f"token ids: got a {type(ids).__name__} of something else. {FORMS}") from None
    if given.dim() == 2 and given.shape[0] == 1:
        given = given[0]
    if given.dim() != 1 or (given.numel() and (given.is_floating_point() or given.dtype == torch.bool)):
        raise ConfigError(
            f"token ids: got a {given.dtype} of shape {tuple(given.shape)}, expected whole numbers of one row. {FORMS}"
        )
    return given.to("cpu", torch.int64, copy=True)
