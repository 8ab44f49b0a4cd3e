"""``bench real``: prefill and decode of a whole checkpoint, stock against patched, by length, batch and threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..assets import BOOK
from ..config.config import LongCtxConfig
from ..config.find import load_named
from ..config.model import text_config
from ..errors import ConfigError
from ..model.modules import state_of
from ..model.patch import patch_model, unpatch_model
from ..tasks.haystack import Haystack, TextHaystack, TinyFiller, TokenNoise, is_tiny_language
from .columns import CONFIG, HALF, RETRIEVAL, STATIC, STOCK
from .e2e import How, Manner, measure, refused
from .llama_cpp import LLAMA, LlamaCpp
from .measure import Told, quiet
from .settings import Settings

WARM = 256  # tokens over which the columns are compared first: the logits of all of them are in memory
FEW = 4  # layers
AUTO = "auto"
SAID = ("dtypes", "tokens", "sink", "recent", "rounds", "steps", "kernel", "seed")  # settings that play a part here

Load = Callable[[str], tuple[Any, Any]]


@dataclass(frozen=True)
class RealCase:
    """Which checkpoint is measured, and how.

    Attributes:
        settings: how to measure; the shape in it plays no part.
        load: the checkpoint and its tokenizer (or None), by a word of ``DTYPES``.
        model: its name.
        config: what to patch the column ``config`` with; None: what "auto" finds, if it finds one.
        batches: sequences read and decoded at once.
        threads: of torch, and of llama.cpp.
        kernel: of every patched column; None: ``auto``, and the config's own.
        llama: the same checkpoint for llama.cpp, one more column.
    """

    settings: Settings
    load: Load
    model: str
    config: str | None = None
    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)
    kernel: str | None = None
    llama: LlamaCpp | None = None

    @property
    def cases(self) -> list[tuple[int, int, int]]:
        """(tokens, sequences, threads) of every case of a dtype."""
        return list(product(self.settings.tokens, self.batches, self.threads))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that every case of a dtype reads."""
        return tuple(tokens * batch for tokens, batch, _ in self.cases)


def case_of(
    settings: Settings,
    load: Load,
    model: str,
    config: str | None = None,
    batch: tuple[int, ...] = (1,),
    threads: tuple[int, ...] | None = None,
    kernel: str | None = None,
    llama_cpp: Path | None = None,
) -> RealCase:
    """What to measure, checked as far as can be without the checkpoint.

    Args:
        threads: None: torch's own choice.

    Raises:
        ConfigError: an empty list or a number below 1, no such kernel or config, or llama.cpp cannot be had.
    """
    threads = (torch.get_num_threads(),) if threads is None else threads
    for name, numbers in (("batch", batch), ("threads", threads)):
        if not numbers or min(numbers) < 1:
            raise ConfigError(f"{name} must be numbers of at least 1, given {list(numbers)}.")
    if config not in (None, AUTO):
        load_named(config)
    settings = settings if kernel is None else replace(settings, kernel=kernel)
    llama = None if llama_cpp is None else LlamaCpp.find(llama_cpp)
    return RealCase(settings, load, model, config, batch, threads, kernel, llama)


@torch.no_grad()
def run(case: RealCase, told: Told = quiet) -> list[dict]:
    """One result per dtype, length, batch and number of threads; of torch's threads nothing stays changed.

    Raises:
        ConfigError: the checkpoint or a config cannot be had.
        LongCtxError: columns that must compute the same do not.
    """
    threads = torch.get_num_threads()
    try:
        return [result for word in case.settings.dtypes for result in _of_dtype(case, word, told)]
    finally:
        torch.set_num_threads(threads)


def facts(case: RealCase, results: list[dict]) -> dict:
    """What the JSON holds besides every time: the checkpoint, its shape, and the settings that play a part."""
    settings = asdict(case.settings)
    said = {name: settings[name] for name in SAID} | {"batch": case.batches, "threads": case.threads}
    return {"model": case.model, "settings": said | results[0]["shape"]}


def _of_dtype(case: RealCase, word: str, told: Told) -> Iterator[dict]:
    model, tokenizer = case.load(word)
    section = LongCtxConfig.describe(model.config)
    shape = {
        "layers": section["num_hidden_layers"],
        "heads": section["num_attention_heads"],
        "kv_heads": section["num_key_value_heads"],
        "head_dim": section["head_dim"],
    }
    settings = replace(case.settings, **shape)
    columns, left_out, config = _columns(case, settings, model)
    # TOLERANCE is that of a few layers; what rounding does to one adds to what it did to those before, as noise does.
    manner = Manner(settings.steps, WARM, max(1.0, settings.layers / FEW) ** 0.5)
    text, prompts = text_of(model, tokenizer)
    left_out |= refused(settings, model, columns, prompts_of(text, 1, WARM // 2, settings.seed))
    columns = {name: how for name, how in columns.items() if name not in left_out}
    for tokens, batch, threads in case.cases:
        torch.set_num_threads(threads)
        ids = prompts_of(text, batch, tokens + settings.steps, settings.seed)
        llama, not_measured = _llama(case, ids, threads)
        figures, error = measure(settings, word, model, columns | llama, ids, told, manner)
        where = {"dtype": word, "tokens": tokens, "batch": batch, "threads": threads, "shape": shape}
        said = {"prompts": prompts, "config": config, "left_out": left_out, "not_measured": not_measured}
        yield {**where, **said, "error": error, "columns": figures}


def _columns(case: RealCase, settings: Settings, model: Any) -> tuple[dict[str, How], dict[str, str], dict | None]:
    """The columns, why some are left out, and what the config is."""
    left_out = {}
    found = None
    columns = {STOCK: How(), STATIC: How(static=True), RETRIEVAL: How({"roles": settings.all_heads("R")})}
    try:
        columns[HALF] = How({"roles": settings.half_streaming()})
    except ConfigError as error:
        left_out[HALF] = str(error)
    try:
        config = _config_of(case, model)
        columns[CONFIG] = How(config)
        heads = {"retrieval_heads": config.retrieval_heads, "kv_heads": config.kv_heads}
        found = {"name": case.config or " ".join([AUTO, *config.model.ids[:1]]), **heads}
    except ConfigError as error:
        if case.config is not None:
            raise
        left_out[CONFIG] = str(error).partition("\n")[0]
    return columns, left_out, found


def _config_of(case: RealCase, model: Any) -> LongCtxConfig:
    """The config of the column, checked against the model."""
    patch_model(model, case.config or AUTO, kernel=case.kernel)
    try:
        return state_of(model).config
    finally:
        unpatch_model(model)


def _llama(case: RealCase, ids: Tensor, threads: int) -> tuple[dict[str, How], dict[str, str]]:
    """The column of llama.cpp, where it is asked for, or why it does not run in this case."""
    if case.llama is None:
        return {}, {}
    if len(ids) > 1:
        return {}, {LLAMA: f"llama-cpp-python reads one sequence at a time, and these are {len(ids)}."}
    return {LLAMA: How(other=case.llama.loaded(threads, ids.shape[1]).turn)}, {}


def text_of(model: Any, tokenizer: Any) -> tuple[Haystack, str]:
    """What the prompts are cut from, and what that is in words."""
    if tokenizer is not None and is_tiny_language(tokenizer):
        return TinyFiller(), "the embedded models' language"
    try:
        if tokenizer is not None:
            return TextHaystack.read(tokenizer, BOOK), "a book"
    except ConfigError:  # Transformers makes an empty tokenizer for some folders without one
        pass
    return TokenNoise(range(text_config(model.config).vocab_size)), "random tokens, for want of a tokenizer"


def prompts_of(text: Haystack, batch: int, length: int, seed: int) -> Tensor:
    """``[batch, length]``, a piece of the text each."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([text.sample(rng, length) for _ in range(batch)])).long()
