"""What ``eviction_beside_kvpress.py --check`` tries: ways of using a model that eviction can get wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from kvpress_rows import OURS, THEIRS, Row, overrides_of, press_of
from kvpress_sides import REFUSALS, Stock
from torch import Tensor
from transformers import DynamicCache

from hf_longctx import patched
from hf_longctx.cache.seam import CACHE, cache_of
from hf_longctx.tasks import tasks_from
from hf_longctx.tasks.language import Language

NEW = 16  # tokens of an answer
NEEDLES = "needle:variant=multi_key:needles=8:questions=2"
LEFT = "not tried: it compresses one prompt, when its context is left, so generate() inside decodes densely"


@dataclass(frozen=True)
class Tried:
    """A row on trial: ``prompts`` are two with a question each, ``turn`` the second question after an answer."""

    model: Any
    kvpress: Any
    row: Row
    prompts: tuple[Tensor, Tensor]
    turn: Tensor

    def generated(self, ids: Tensor, **given: Any) -> Any:
        return self.model.generate(
            ids,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **{"attention_mask": torch.ones_like(ids), **given},
        )


def padding(one: Tried) -> str:
    """A short prompt, padded on the left beside a long one, against the same alone: largest difference of logits."""
    short, long = one.prompts[0][len(one.prompts[0]) // 2 :], one.prompts[1]
    ids = torch.zeros(2, len(long), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate((short, long)):
        ids[row, len(long) - len(prompt) :], mask[row, len(long) - len(prompt) :] = prompt, 1
    both, alone = one.generated(ids, attention_mask=mask), one.generated(short[None])
    same = alike(both.sequences[0, len(long) :], alone.sequences[0, len(short) :])
    pairs = list(zip(both.logits, alone.logits, strict=True))[: same + 1]
    most = max(difference(together[0], single[0]) for together, single in pairs)
    return f"largest logit difference {most:.2g}, {same} of {NEW} tokens the same"


def assisted(one: Tried) -> str:
    """Candidates that were looked up in the prompt are verified: tokens as without them."""
    ids = one.prompts[0][None]
    plain, looked_up = (one.generated(ids, **more).sequences[0] for more in ({}, {"prompt_lookup_num_tokens": 4}))
    return f"{alike(plain[ids.shape[1] :], looked_up[ids.shape[1] :])} of {NEW} tokens the same"


def turns(one: Tried) -> str:
    """A second question to generate() with the cache of the first, against its tokens read at their own positions."""
    first = one.generated(one.prompts[0][None])
    cache, said = cache_of(first), first.sequences[0]
    ids = torch.cat([said, one.turn])
    past = len(said) - 1  # generate() leaves its last token unread
    apart, more = copy.deepcopy(cache), {}
    if one.row.side != OURS:
        more["position_ids"] = torch.arange(past, len(ids))[None]
    want = one.model(ids[None, past:], **{CACHE: apart}, use_cache=True, logits_to_keep=1, **more).logits[0, -1]
    got = one.generated(ids[None], **{CACHE: cache}).logits[0][0]
    return f"largest logit difference {difference(got, want):.2g}"


def presses(one: Tried) -> str:
    """The way of `Stock` to use a press against its own: keys and values, and which keys are masked."""
    if one.row.side != THEIRS:
        return "used as meant"
    stock, ids = Stock(one.model, one.kvpress), one.prompts[0]
    cache, _ = stock.compressed(one.row, stock.read(ids), ids)
    masks = [layer.self_attn.masked_key_indices for layer in stock.base.layers]
    own = DynamicCache()
    with press_of(one.kvpress, one.row)(one.model):
        stock.base(input_ids=ids[None], **{CACHE: own})
    most = max(
        difference(getattr(a, name), getattr(b, name))
        for a, b in zip(cache.layers, own.layers, strict=True)
        for name in ("keys", "values")
    )
    others = [layer.self_attn.masked_key_indices for layer in stock.base.layers]
    same = all(
        (a is None and b is None) or all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(masks, others, strict=True)
    )
    return f"largest difference {most:.2g}, masks {'the same' if same else 'differ'}"


CHECKS = {"padding": padding, "assisted": assisted, "turns": turns, "presses": presses}


def check(name: str, model: Any, kvpress: Any, config: str, row: Row, language: Language, tokens: int) -> str:
    """What the check ``name`` found of a row, or the error it ended in."""
    samples = [tasks_from(NEEDLES)[0].make(language, tokens, seed=seed) for seed in (0, 1)]
    prompts = tuple(torch.as_tensor([*one.context, *one.questions[0].prompt]) for one in samples)
    turn = torch.as_tensor([*language.between, *samples[0].questions[1].prompt])
    if row.side == THEIRS and row.name == "KVzip":
        return LEFT
    try:
        with used(model, kvpress, config, row, name):
            return CHECKS[name](Tried(model, kvpress, row, prompts, turn))
    except REFUSALS as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def used(model: Any, kvpress: Any, config: str, row: Row, name: str) -> Iterator[None]:
    """The model as a user of the row has it."""
    if row.side == OURS:
        with patched(model, config, **overrides_of(row, config)):
            yield
    elif row.side == THEIRS and name != "presses":
        with press_of(kvpress, row)(model):
            yield
    else:
        yield


def alike(a: Tensor, b: Tensor) -> int:
    """How many tokens are the same before the first that is not."""
    count = min(len(a), len(b))
    return int((a[:count] == b[:count]).cumprod(0).sum())


def difference(a: Tensor, b: Tensor) -> float:
    return float("inf") if a.shape != b.shape else (a.float() - b.float()).abs().max().item()
