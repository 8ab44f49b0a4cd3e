"""What makes logits of the base model's hidden states, where that is the output embedding alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.cache import LongCtxCache
from ..cache.finite import check_logits
from ..cache.seam import CACHE, cache_of
from ..cache.weights import input_device
from ..config.config import LongCtxConfig
from ..errors import UnsupportedModelError
from .attention import FORWARD
from .modules import language_model

COMPARED = "next-token agreement, KL and perplexity are computed from. Compare generated tokens instead."
SURPRISAL = "score 'surprisal' is computed from. Take another score, such as expected_attention or key_norm."


@torch.no_grad()
def output_head(model: nn.Module, why: str = COMPARED) -> Callable[[Tensor], Tensor]:
    """What makes logits ``[n, V]`` of the base model's hidden states ``[n, D]``.

    Args:
        why: what the error says they are needed for.

    Raises:
        ConfigError: the logits are nan.
        UnsupportedModelError: the model makes its logits in another way as well (scaled, capped, a learned prefix).
    """
    head = model.get_output_embeddings()
    few = torch.arange(min(8, language_model(model).config.vocab_size), device=input_device(model))[None]
    want = got = None
    if head is not None:
        want = model(input_ids=few, use_cache=False).logits[0]
        check_logits(want)
        got = head(language_model(model)(input_ids=few, use_cache=False).last_hidden_state[0])
    if got is None or not torch.allclose(got.float(), want.float(), rtol=1e-2, atol=1e-3 * want.abs().max().item()):
        raise UnsupportedModelError(
            f"the logits of {type(model).__name__} are not its output embedding of the base model's hidden states, "
            f"which {why}"
        )
    return head


def asks_surprisal(settings: LongCtxConfig) -> bool:
    """Whether the store of retrieval heads has a score that asks how likely each token was."""
    return getattr(getattr(settings.stores.retrieval, "rule", None), "surprises", False)


@torch.no_grad()
def surprisal_head(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """`output_head` of a model that is not patched, in eval mode meanwhile; without numbers (``meta``) it is believed.

    Raises:
        UnsupportedModelError: as `output_head`.
    """
    if input_device(model).type == "meta":
        return model.get_output_embeddings()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return output_head(model, SURPRISAL)
    finally:
        for module, training in modes:
            module.training = training


class SeeHidden:
    """Forward hook of the base model: a cache whose score asks for surprisal is shown the last hidden states."""

    def __call__(self, base: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        cache = kwargs[CACHE] if kwargs.get(CACHE) is not None else cache_of(output)
        forward = kwargs.get(FORWARD)
        if forward is None or not isinstance(cache, LongCtxCache) or cache.surprisals is None:
            return
        cache.surprisals.saw(forward.rows.past, output[0].detach())
        if cache.surprisals.waits:
            cache.settle_surprisals()
