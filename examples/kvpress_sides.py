"""How either side of ``eviction_beside_kvpress.py`` reads a prompt, compresses it and goes on."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from kvpress_rows import DENSE, HALVES, OURS, THEIRS, Row, overrides_of, press_of
from torch import Tensor
from transformers import DynamicCache

from hf_longctx import LongCtxCache, patched
from hf_longctx.cache.bytes import storage_bytes
from hf_longctx.cache.cache import cache_bytes
from hf_longctx.cache.seam import CACHE, cache_of
from hf_longctx.errors import LongCtxError
from hf_longctx.eviction.base import Asked
from hf_longctx.model.modules import language_model
from hf_longctx.tasks.base import Sample
from hf_longctx.tasks.forced import scored

REFUSALS = (LongCtxError, AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError)
Told = list[dict[str, Any]]  # what an attention module of each layer was given


@dataclass
class Read:
    """A prompt that was read densely: its cache, what its attention modules got, the logits ``[V]`` after it."""

    cache: Any
    told: Told
    logits: Tensor


class Stock:
    """The model as Transformers has it, and the presses of kvpress over it.

    A press looks at what an attention module was given and at the cache of its layer, and changes that cache alone. So
    a prompt is read once, and each press is shown what was given; ``--check presses`` compares with their own way.
    """

    def __init__(self, model: Any, kvpress: Any):
        self.model, self.kvpress = model, kvpress
        self.base = language_model(model)
        self._zipped: dict[tuple[int, ...], tuple[Tensor, int]] = {}

    def read(self, ids: Tensor, before: Read | None = None) -> Read:
        """Read ``ids [T]`` after ``before``, which stays as it is."""
        past = self._length(before)
        cache = DynamicCache() if before is None else copy.deepcopy(before.cache)
        with self._listening() as told:
            logits = self.forward(cache, ids, past, 1)
        return Read(cache, told if before is None else _joined(before.told, told), logits[0])

    def forward(self, cache: Any, ids: Tensor, past: int, keep: int) -> Tensor:
        """Logits ``[keep, V]`` of ``ids [T]`` at the positions from ``past`` on, whatever the cache has left."""
        positions = torch.arange(past, past + len(ids))[None]
        out = self.model(ids[None], position_ids=positions, **{CACHE: cache}, use_cache=True, logits_to_keep=keep)
        return out.logits[0]

    def compressed(self, row: Row, read: Read, ids: Tensor) -> tuple[Any, int]:
        """(cache of the prompt ``ids`` as the row leaves it, bytes that are left where the press is used as meant).

        Masks of a press are on the model, until the next one.
        """
        unmask(self.base)
        cache = copy.deepcopy(read.cache)
        if row.side == DENSE:
            return cache, cache_bytes(cache)
        press = press_of(self.kvpress, row)
        if row.name == "KVzip":
            press.score_val, held = self._zip(press, ids)
            press.compress_post(self.model)
            return cache, held
        press.post_init_from_model(self.model)
        where = {"cache_position": torch.arange(len(ids)), CACHE: cache}
        for layer, told in zip(self.base.layers, read.told, strict=True):
            layer.self_attn.rotary_emb = self.base.rotary_emb
            press.forward_hook(layer.self_attn, [], {**told, **where}, [None, None])
        return cache, cache_bytes(cache)

    def _zip(self, press: Any, ids: Tensor) -> tuple[Tensor, int]:
        """(scores, bytes of the cache) by their own way, once per prompt: scores do not depend on the budget."""
        key = tuple(ids.tolist())
        if key not in self._zipped:
            cache, found, whole = DynamicCache(), [], press.compress_post
            press.compress_post = lambda model: found.append(press.score_val.clone())
            with press(self.model):
                self.base(input_ids=ids[None], **{CACHE: cache})
            press.compress_post = whole
            self._zipped[key] = found[0], cache_bytes(cache)
        scores, held = self._zipped[key]
        return scores.clone(), held

    @contextmanager
    def _listening(self) -> Iterator[Told]:
        told: Told = []

        def hear(module: Any, args: Any, kwargs: dict, output: Any) -> None:
            told.append({name: kwargs[name] for name in ("hidden_states", "position_embeddings")})

        hooks = [layer.self_attn.register_forward_hook(hear, with_kwargs=True) for layer in self.base.layers]
        try:
            yield told
        finally:
            for hook in hooks:
                hook.remove()

    @staticmethod
    def _length(read: Read | None) -> int:
        return 0 if read is None else read.told[0]["hidden_states"].shape[1]


def unmask(base: Any) -> None:
    """Forget which keys a press has masked, as the next prompt would."""
    for layer in base.layers:
        layer.self_attn.masked_key_indices = None


def _joined(first: Told, second: Told) -> Told:
    """What one forward over both would have given."""
    found = []
    for a, b in zip(first, second, strict=True):
        angles = tuple(
            torch.cat(pair, 1) for pair in zip(a["position_embeddings"], b["position_embeddings"], strict=True)
        )
        found.append(
            {
                "hidden_states": torch.cat([a["hidden_states"], b["hidden_states"]], 1),
                "position_embeddings": angles,
            }
        )
    return found


def theirs(stock: Stock, rows: Sequence[Row], sample: Sample, questions: int) -> Iterator[tuple[Row, str, dict]]:
    """(row, where the questions are, what was found) for dense and the presses."""
    context = torch.as_tensor(sample.context)
    asked = [tuple(map(torch.as_tensor, (one.prompt, one.target))) for one in sample.questions[:questions]]
    read = stock.read(context)
    whole = [stock.read(prompt, read) for prompt, _ in asked]
    for row in rows:

        def inside(row: Row = row) -> dict:
            answers, held, past = [], [], []
            for (prompt, target), one in zip(asked, whole, strict=True):
                ids = torch.cat([context, prompt])
                cache, own = stock.compressed(row, one, ids)
                held.append(own)
                past.append(cache_bytes(one.cache))
                rest = stock.forward(cache, target[:-1], len(ids), len(target) - 1)
                answers.append(scored(torch.cat([one.logits[None], rest]), target))
            return answered(answers, sum(held), sum(past))

        def after(row: Row = row) -> dict:
            (left, held), answers = stock.compressed(row, read, context), []
            for prompt, target in asked:
                ids, cache = torch.cat([prompt, target[:-1]]), copy.deepcopy(left)
                answers.append(scored(stock.forward(cache, ids, len(context), len(target)), target))
            return answered(answers, held, cache_bytes(read.cache))

        yield row, "inside", or_refused(inside)
        yield row, "after", or_refused(after)


def ours(
    model: Any, tokenizer: Any, config: str, rows: Sequence[Row], sample: Sample, questions: int
) -> Iterator[tuple[Row, str, dict]]:
    """As ``theirs``, for rows of this package that read alike: the context is read once for all of them.

    Each question and budget goes on from a copy.
    """
    context = torch.as_tensor(sample.context)
    asked = [tuple(map(torch.as_tensor, (one.prompt, one.target))) for one in sample.questions[:questions]]

    def forward(cache: Any, ids: Tensor, keep: int) -> Tensor:
        return model(ids[None], **{CACHE: cache}, use_cache=True, logits_to_keep=keep).logits[0]

    def inside(row: Row, whole: Sequence[tuple[LongCtxCache, Tensor]]) -> dict:
        answers, held, dense = [], [], []
        for (read, first), (_, target) in zip(whole, asked, strict=True):
            cache = compressed(read, row.budget, tokenizer)
            held.append(cache.nbytes)
            dense.append(cache.nbytes_dense)
            rest = forward(cache, target[:-1], len(target) - 1)
            answers.append(scored(torch.cat([first, rest]), target))
        return answered(answers, sum(held), sum(dense))

    def after(row: Row, read: LongCtxCache) -> dict:
        left, answers = compressed(read, row.budget, tokenizer), []
        for prompt, target in asked:
            ids, cache = torch.cat([prompt, target[:-1]]), copy.deepcopy(left)
            answers.append(scored(forward(cache, ids, len(target)), target))
        return answered(answers, left.nbytes, left.nbytes_dense)

    try:
        with patched(model, config, **overrides_of(rows[0], config)):
            read, whole = LongCtxCache(model, rollback=False), []
            forward(read, context, 1)
            for prompt, _ in asked:
                cache = copy.deepcopy(read)
                first = forward(cache, prompt, 1)
                whole.append((judged(cache, tokenizer), first))
            read = judged(read, tokenizer)
            for row in rows:
                yield row, "inside", or_refused(lambda row=row: inside(row, whole))
                yield row, "after", or_refused(lambda row=row: after(row, read))
    except REFUSALS as error:
        yield from ((row, where, refusal(error)) for row in rows for where in HALVES)


def judged(cache: LongCtxCache, tokenizer: Any) -> LongCtxCache:
    """The cache, once the model read what its score asks for; the scores stay with it, for any budget."""
    if isinstance(cache.rule, Asked):
        cache.compress(budget={"share": 1.0}, tokenizer=tokenizer)
    return cache


def compressed(read: LongCtxCache, share: float | None, tokenizer: Any) -> LongCtxCache:
    """A copy whose prompt has ended: of which only the budget is left, where tokens are evicted by score."""
    cache = copy.deepcopy(read)
    if cache.rule is None:
        cache.evict()
    else:
        cache.compress(budget={"share": share}, tokenizer=tokenizer if isinstance(cache.rule, Asked) else None)
    return cache


def answered(answers: Sequence[Any], held: int, dense: int) -> dict:
    return {
        "right": [one.right for one in answers],
        "nll": [round(one.nll, 6) for one in answers],
        "counts": [one.tokens for one in answers],
        "bytes": held,
        "dense_bytes": dense,
    }


def or_refused(work: Callable[[], dict]) -> dict:
    try:
        return work()
    except REFUSALS as error:
        return refusal(error)


def refusal(error: Exception) -> dict:
    return {"refused": f"{type(error).__name__}: {error}"[:400]}


def costs(model: Any, tokenizer: Any, kvpress: Any, config: str, row: Row, ids: Tensor, steps: int) -> dict:
    """Seconds until the second token of an answer to ``ids [T]`` is known, milliseconds of those after it, and bytes.

    Bytes are those of the cache once the second token is known, and those of all live tensors beyond the ones there
    were before. A press is used as kvpress means it.
    """

    def run() -> dict:
        unmask(language_model(model))  # of the row before
        gc.collect()
        before, past = live_bytes(), len(ids)
        start = time.perf_counter()
        cache = DynamicCache() if row.side in (DENSE, THEIRS) else LongCtxCache(model, rollback=False)
        with press_of(kvpress, row)(model) if row.side == THEIRS else nullcontext():
            out = language_model(model)(input_ids=ids[None], **{CACHE: cache}, use_cache=True)
        if row.side == OURS and isinstance(cache.rule, Asked):
            cache.compress(tokenizer=tokenizer)
        token = model.get_output_embeddings()(out.last_hidden_state[0, -1:]).argmax(-1)
        cache, took = cache_of(out), []
        del out
        for step in range(1 + steps):
            where = {} if row.side not in (DENSE, THEIRS) else {"position_ids": torch.tensor([[past + step]])}
            begin = time.perf_counter()
            token = model(token[None], **{CACHE: cache}, use_cache=True, **where).logits[0].argmax(-1)
            took.append(time.perf_counter() - begin)
            if not step:
                prompt_s, held = time.perf_counter() - start, cache_bytes(cache)
        gc.collect()
        found = {"prompt_s": prompt_s, "token_ms": 1000 * median(took[1:]), "bytes": held}
        return {**found, "live": live_bytes() - before}

    def patched_run() -> dict:
        with patched(model, config, **overrides_of(row, config)):
            return run()

    return or_refused(run if row.side in (DENSE, THEIRS) else patched_run)


def live_bytes() -> int:
    """Bytes of the distinct memory behind all tensors that Python knows."""
    return storage_bytes(one for one in gc.get_objects() if type(one) in (Tensor, torch.nn.Parameter))
