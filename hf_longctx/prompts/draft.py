"""A small model drafts the answer, and the prompt's tokens are evicted by what the draft attends to (SpecKV)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.cache import LongCtxCache
from ..cache.weights import input_device
from ..errors import ConfigError
from ..eviction.draft import Draft
from .prompt import Prompt, as_ids


@torch.no_grad()
def draft_scores(
    model: nn.Module,
    draft: nn.Module | None,
    ids: Tensor | Sequence[int],
    *,
    tokens: int,
    score: Draft | Mapping[str, Any] | None = None,
    budget: Mapping[str, Any] | None = None,
    by: str | None = None,
    chunk_size: int | None = None,
) -> LongCtxCache:
    """Read a prompt and evict of it what a drafted answer does not attend to (SpecKV, arXiv:2506.08373).

        cache = draft_scores(model, small, ids, tokens=64)
        model.generate(ids, past_key_values=cache)

    The config's score must be ``draft``, so that the model keeps the queries it votes by. Drafts are greedy. Memory is
    whole until all scores are known.

    Args:
        model: a patched model in eval mode, whose retrieval heads have ``store: evicted``.
        draft: a causal language model with the same token ids; None where ``tokens`` is 0.
        ids: the prompt ``[T]`` or ``[1, T]``, at least two tokens.
        tokens: how many the draft answers at most; the authors take as many as will be generated.
        score, budget, by: as in `LongCtxCache.compress`; None: the config's.
        chunk_size: read the prompt in pieces of so many tokens; None: in one.

    Returns:
        A cache of all tokens but the last, which the next forward reads.

    Raises:
        CacheError: the model kept no queries for this score.
        ConfigError: fewer than two tokens, no draft, or one with other token ids.
        UnsupportedModelError: the model is not patched.
        UnsupportedModeError: no head's tokens are evicted by score, or a model in training.
    """
    prompt = as_ids(ids)
    if len(prompt) < 2:
        raise ConfigError(f"ids: got {len(prompt)} tokens, expected at least two: the last is read by generate().")
    cache = LongCtxCache(model)
    answer = _drafted(draft, prompt, tokens)
    if len(answer) and int(answer.max()) >= (size := model.get_input_embeddings().weight.shape[0]):
        raise ConfigError(
            f"draft: {type(draft).__name__} answered with token {int(answer.max())}, and the model has {size}. Take a "
            "draft model with the same tokenizer."
        )
    Prompt(model, None, prompt, cache).catch_up(chunk_size)
    cache.compress(score, budget, by, follows=torch.cat([prompt[-1:], answer]))
    return cache


def _drafted(draft: nn.Module | None, prompt: Tensor, tokens: int) -> Tensor:
    """Token ids ``[m]`` of the draft's greedy answer."""
    if type(tokens) is not int or tokens < 0:
        raise ConfigError(f"tokens: got {tokens!r}, expected a whole number from 0.")
    if not tokens:
        return prompt[:0]
    if draft is None:
        raise ConfigError(f"draft: got None with tokens={tokens}. Give a model that drafts, or tokens=0.")
    ids = prompt[None].to(input_device(draft))
    how = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
    found = draft.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **how)
    return found[0, len(prompt) :].cpu()
