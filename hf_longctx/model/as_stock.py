"""What a model that is not patched runs where its attention word is ours: Transformers' own sdpa.

Code that reads ``config._attn_implementation`` or ``config`` of a patched model and makes a second model from it (a
reference model for preference training, a draft) gets a model that computes what it would on sdpa.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedModeError

STOCK = "sdpa"
UNKNOWN = ("s_aux", "softcap")  # what changes the scores and sdpa does not compute, or (before 5.23) leaves out

logger = logging.getLogger(__name__)
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class StockMask:
    """The mask that sdpa would get, made when an attention module without a plan asks for it.

    A patched model and a second one may share one config object, so only the module can tell which of them it is in;
    a patched one needs no mask. generate() makes masks ahead of the forward for a static cache: there this one is seen
    as a mask of 4 dimensions that is ready.

    Attributes:
        window: tokens of the sliding window or of the chunks that the mask shows, None for all before a token.
        padding: the mask ``[batch, tokens]`` that it was to be made of, or None.
    """

    ndim = 4

    def __init__(self, make: Callable[[], Tensor | None], window: int | None = None, padding: Tensor | None = None):
        self.make = make
        self.window = window
        self.padding = padding

    @cached_property
    def mask(self) -> Tensor | None:
        return self.make()

    def contiguous(self) -> Tensor | None:
        """The mask itself; generate() before Transformers 5.24 asks for it."""
        return None if self.mask is None else self.mask.contiguous()


def attend_as_stock(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | StockMask | None,
    *,
    patched: bool = False,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one layer as sdpa computes it: of a model that is not patched, or one that a patch leaves alone.

    Args:
        patched: it is a layer of a patched model.

    Raises:
        UnsupportedModeError: the module asks for what sdpa does not compute.
    """
    unknown = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if unknown and patched:
        raise UnsupportedModeError(
            f"layer {module.layer_idx} ({type(module).__name__}) is left to Transformers' sdpa in a patched model, "
            f"which does not compute {', '.join(unknown)}. Run it dense: model.set_attn_implementation('eager')."
        )
    if unknown:
        raise UnsupportedModeError(
            f"{type(module).__name__} is not patched and was given the attention 'longctx', most likely by "
            "attn_implementation=other.config._attn_implementation of a patched model. There it runs as on 'sdpa', "
            f"which does not compute {', '.join(unknown)}. Load it with attn_implementation='eager'."
        )
    if not patched:
        _tell(module)
    mask = attention_mask.mask if isinstance(attention_mask, StockMask) else attention_mask
    return ALL_ATTENTION_FUNCTIONS[STOCK](module, query, key, value, mask, **kwargs)


def longctx_mask(*args, allow_is_causal_skip: bool = True, config=None, **kwargs) -> Tensor | StockMask | None:
    """Mask function: padding reaches the layers of a patched model as ``Rows``, so a mask is made on demand only.

    The config of a patched model has ``longctx``; one with our word alone is of another model. What is more than causal
    attention over padded rows is made at once: `attend` refuses it, and a model that is not patched reads it.
    """
    if isinstance(kwargs.get("attention_mask"), StockMask):
        return kwargs["attention_mask"]
    make = partial(
        ALL_MASK_ATTENTION_FUNCTIONS[STOCK], *args, allow_is_causal_skip=allow_is_causal_skip, config=config, **kwargs
    )
    only_padding = allow_is_causal_skip and "allow_is_bidirectional_skip" not in kwargs
    ours = only_padding and getattr(config, "longctx", None) is not None
    return StockMask(make, kwargs.get("local_size"), kwargs.get("attention_mask")) if ours else make()


def padding_of(attention_mask: Any) -> Any:
    """The mask ``[batch, tokens]`` of which a model made one for each kind of layer beforehand; any other as given."""
    if not isinstance(attention_mask, dict) or not all(isinstance(one, StockMask) for one in attention_mask.values()):
        return attention_mask
    return next((one.padding for one in attention_mask.values()), None)


def _tell(module: nn.Module) -> None:
    """Say once per model that nothing is saved here: its first layer is told apart from those told before."""
    if torch.compiler.is_compiling() or getattr(module, "layer_idx", 0) or module in _told:
        return
    _told.add(module)
    logger.warning(
        "a model that is not patched was given the attention 'longctx' (attn_implementation= or config= of a patched "
        "model): it runs dense, as on 'sdpa'. patch_model(model) patches it too; attn_implementation='sdpa' ends this"
    )
