"""``bench batching``: many requests by continuous batching and as one padded batch, stock against patched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from ..config.config import LongCtxConfig
from ..errors import LongCtxError
from ..model.modules import state_of
from ..model.patch import patched
from .measure import Samples, Told, paired_ratio, quiet, turns
from .real import Load, prompts_of, text_of
from .settings import Settings, check_sizes

STOCK, STOCK_PADDED = "stock, continuous", "stock, one padded batch"
OURS, OURS_PADDED = "patched, continuous", "patched, one padded batch"
COLUMNS = (STOCK, STOCK_PADDED, OURS, OURS_PADDED)

Answers = list[list[int]]


@dataclass(frozen=True)
class BatchingCase:
    """Which requests are answered, and how.

    Attributes:
        tokens: of the longest prompt of each case; the shortest has half, the others lie between.
        requests: how many there are.
        new: tokens that each of them is answered with.
        dtypes: words of ``DTYPES``.
        page: tokens of a page.
        batch_tokens: most tokens of one step of continuous batching.
        config: what to patch with; None: half of the KV heads of each layer stream (of 3: one), drawn by the seed.
        sink, recent: of those that stream then.
        rounds: how often each column takes its turn.
    """

    tokens: tuple[int, ...]
    requests: int = 8
    new: int = 32
    dtypes: tuple[str, ...] = ("fp32",)
    page: int = 256
    batch_tokens: int = 2048
    config: str | None = None
    sink: int = 64
    recent: int = 256
    rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(self.tokens, self.dtypes)

    def lengths(self, tokens: int) -> list[int]:
        """Tokens of each prompt, the longest first."""
        return [tokens - tokens * at // (2 * max(1, self.requests - 1)) for at in range(self.requests)]

    def batching(self, lengths: list[int]) -> ContinuousBatchingConfig:
        """Room for all requests at once, if every head keeps every token."""
        blocks = sum(ceil((length + self.new) / self.page) for length in lengths)
        return ContinuousBatchingConfig(
            page_size=self.page, num_blocks=blocks, max_batch_tokens=self.batch_tokens, use_cuda_graph=False
        )

    def generation(self, eos: int | None = None) -> GenerationConfig:
        """Answers of `new` tokens; ``eos``: how no token is told to end them."""
        return GenerationConfig(max_new_tokens=self.new, do_sample=False, eos_token_id=eos, pad_token_id=0)


def run(case: BatchingCase, load: Load, told: Told = quiet) -> list[dict[str, Any]]:
    """One result for each dtype and length; ``columns`` has every raw time.

    Raises:
        LongCtxError: a request ended in an error, or has another answer than generate() gives it alone.
    """
    return [result for word in case.dtypes for result in _of_dtype(case, word, load, told)]


def _of_dtype(case: BatchingCase, word: str, load: Load, told: Told) -> Iterator[dict[str, Any]]:
    model, tokenizer = load(word)
    text, source = text_of(model, tokenizer)
    for tokens in case.tokens:
        lengths = case.lengths(tokens)
        rows = prompts_of(text, case.requests, tokens, case.seed).tolist()
        prompts = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        with _patched(case, model):
            config = state_of(model).config
            heads = {"retrieval_heads": config.retrieval_heads, "kv_heads": config.kv_heads}
            same, bytes_of = _check(case, model, prompts)
        times = {name: Samples() for name in COLUMNS}
        for _, name in turns(times, case.rounds, tokens, told):
            _turn(case, model, name, prompts, times[name])
        figures = {name: _figures(case, times, name) for name in COLUMNS}
        said = {"dtype": word, "tokens": tokens, "prompts": source, **heads, "same": same, **bytes_of}
        yield {**said, "columns": figures}


def _turn(case: BatchingCase, model: Any, name: str, prompts: Answers, into: Samples) -> None:
    answer = padded if name in (STOCK_PADDED, OURS_PADDED) else continuous
    if name in (OURS, OURS_PADDED):
        with _patched(case, model):
            into.time(lambda: answer(case, model, prompts))
    else:
        into.time(lambda: answer(case, model, prompts))


def _figures(case: BatchingCase, times: dict[str, Samples], name: str) -> dict[str, Any]:
    own = times[name]
    return {
        **own.as_dict(),
        "tokens_per_s": 1000 * case.requests * case.new / own.median,
        "faster_than_continuous": paired_ratio(times[STOCK], own),
        "faster_than_padded": paired_ratio(times[STOCK_PADDED], own),
    }


def _patched(case: BatchingCase, model: Any) -> AbstractContextManager:
    if case.config is not None:
        return patched(model, case.config)
    shape = LongCtxConfig.describe(model.config)
    sizes = {"layers": shape["num_hidden_layers"], "heads": shape["num_attention_heads"]}
    half = Settings((2,), seed=case.seed, kv_heads=shape["num_key_value_heads"], **sizes).half_streaming()
    streaming = {"store": "sink_recent", "sink": case.sink, "recent": case.recent}
    return patched(model, {"model": shape, "heads": {"roles": half}, "stores": {"streaming": streaming}})


def continuous(
    case: BatchingCase, model: Any, prompts: Answers, look: Callable[[Any], object] | None = None
) -> Answers:
    """The answers by continuous batching; ``look`` is shown the manager once all are there.

    Raises:
        LongCtxError: a request ended in an error.
    """
    config = case.batching([len(prompt) for prompt in prompts])
    answers: dict[str, list[int]] = {}
    with model.continuous_batching_context_manager(
        case.generation(-1), continuous_batching_config=config, warmup=False
    ) as manager:
        names = manager.add_requests(prompts, max_new_tokens=case.new)
        while len(answers) < len(names):
            result = manager.get_result(timeout=1.0)
            if result is None and manager.is_running():
                continue
            if result is None or result.error is not None:
                raise LongCtxError(f"a request ended in an error: {getattr(result, 'error', 'the manager stopped')}")
            answers[result.request_id] = result.generated_tokens
        if look is not None:
            look(manager)
    return [answers[name] for name in names]


@torch.no_grad()
def padded(case: BatchingCase, model: Any, prompts: Answers) -> Answers:
    """The answers by generate(), of all prompts at once."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    out = model.generate(ids, attention_mask=mask, generation_config=case.generation())
    return out[:, longest:].tolist()


def _check(case: BatchingCase, model: Any, prompts: Answers) -> tuple[float, dict[str, int]]:
    """Share of the tokens that are those of generate(), request by request; and the bytes of the pages.

    Rounding differs between a batch and one request, so that in a low precision an answer may go another way.

    Raises:
        LongCtxError: the first token of more than half of the requests is another.
    """
    seen: dict[str, int] = {}

    def look(manager: Any) -> None:
        counts = manager.cache.counts
        seen.update(bytes=counts.nbytes, bytes_dense=counts.nbytes_dense)

    got = continuous(case, model, prompts, look)
    alone = [padded(case, model, [prompt])[0] for prompt in prompts]
    first = sum(one[0] == other[0] for one, other in zip(got, alone, strict=True))
    if 2 * first < len(prompts):
        raise LongCtxError(
            f"continuous batching gave {len(prompts) - first} of {len(prompts)} requests another first token than "
            "generate() gives them alone."
        )
    pairs = [pair for one, other in zip(got, alone, strict=True) for pair in zip(one, other, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs), seen
