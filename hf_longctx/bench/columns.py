"""What is compared: the attention modules and caches of stock and patched models of one shape, and their results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, Cache, DynamicCache

from ..cache.cache import LongCtxCache
from ..config.config import LongCtxConfig
from ..errors import LongCtxError
from ..layout.forward import Forward, ForwardLog
from ..layout.rows import Rows
from ..model.patch import patch_model
from ..planning.sizes import dtype_of as dtype_of
from .settings import VOCABULARY, Settings

STOCK = "stock"
STATIC = "stock static"
RETRIEVAL = "all retrieval"
HALF = "half streaming"
STREAMING = "all streaming"
CONFIG = "config"
SDPA = "sdpa"  # what the stock column calls
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}  # largest error, relative to the largest value


def make_model(settings: Settings, dtype: torch.dtype, device: str) -> Any:
    """A Llama model with random weights on ``device``; ``meta`` gives the real modules without the memory."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden,
        intermediate_size=4 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    )
    torch.manual_seed(settings.seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=SDPA).eval()


def sparse_name(density: int) -> str:
    """The column whose retrieval heads read ``density`` percent of the causal blocks of a prompt."""
    return f"{HALF} + sparse {density}%"


def patch(
    model: Any, settings: Settings, roles: list[str], prefill: dict | None = None, select: dict | None = None
) -> Any:
    """Patch ``model`` with these roles, the benchmark's streaming store and kernel, and this ``prefill`` section.

    ``select``: what decoded tokens read in retrieval heads, as in a config; None: everything.
    """
    config = {
        "model": LongCtxConfig.describe(model.config),
        "heads": {"roles": roles},
        "stores": {"streaming": {"store": "sink_recent", "sink": settings.sink, "recent": settings.recent}},
        "prefill": prefill or {},
        "decode": {} if select is None else {"retrieval": select},
        "kernel": settings.kernel,
    }
    return patch_model(model, config)


@dataclass
class Column:
    """One way of keeping and reading K/V: a model's attention modules and a cache.

    ``update`` and ``attend`` are the two calls that an attention module's forward makes between its projections.

    Attributes:
        forward: that of the last ``attend`` of a patched model.
        log: what its forwards noted down.
        mask: which keys are read, ``[1, 1, T, S]``, where a stock model would make a mask.
    """

    model: Any
    cache: Cache
    functions: AttentionInterface = field(default_factory=AttentionInterface)
    forward: Any = None
    mask: Tensor | None = None
    log: ForwardLog = field(default_factory=ForwardLog)

    @classmethod
    def of(
        cls,
        settings: Settings,
        dtype: torch.dtype,
        roles: list[str] | None,
        prefill: dict | None = None,
        select: dict | None = None,
    ) -> Column:
        """Stock Transformers for ``roles`` None, otherwise a model that is patched with them (`patch`)."""
        model = make_model(settings, dtype, "meta")
        if roles is None:
            return cls(model, DynamicCache(config=model.config))
        return cls(model, LongCtxCache(patch(model, settings, roles, prefill, select)))

    @property
    def kernel(self) -> str:
        """The kernels that ran in the last ``attend``."""
        return SDPA if self.forward is None else "+".join(sorted(self.forward.log.used))

    def forget(self) -> None:
        """Go on with an empty cache."""
        patched = isinstance(self.cache, LongCtxCache)
        self.cache = LongCtxCache(self.model) if patched else DynamicCache(config=self.model.config)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Any, Any]:
        if layer == 0 and isinstance(self.cache, LongCtxCache):  # what the hook of a patched model does
            rows = Rows(k.shape[0], self.cache.seen, k.shape[2])
            self.cache.begin(Forward(rows, self.log, cached=True, steps=rows.new == 1))
        return self.cache.update(k, v, layer)

    def attend(self, layer: int, q: Tensor, kept: tuple[Any, Any]) -> Tensor:
        """``[B, T, H, D]``"""
        module = self.model.model.layers[layer].self_attn
        self.forward = getattr(kept[0], "forward", None)
        function = self.functions[module.config._attn_implementation]
        return function(module, q, *kept, self.mask, dropout=0.0, scaling=module.scaling)[0]


def kept_buffers(kept: tuple[Any, Any]) -> list[Tensor]:
    """Views of the keys and values that a column's attention reads in one layer."""
    if isinstance(kept[0], Tensor):
        return list(kept)
    return [part for heads in kept[0].parts for segment in heads.segments for part in segment.contents()]


def random_heads(heads: int, tokens: int, settings: Settings, dtype: torch.dtype) -> Tensor:
    """``[1, heads, tokens, D]`` in the memory layout a projection gives: token by token."""
    return torch.randn(1, tokens, heads, settings.head_dim).to(dtype).transpose(1, 2)


def streaming_answer(q: Tensor, k: Tensor, v: Tensor, at: Tensor, settings: Settings) -> Tensor:
    """``[B, T, H, D]`` in float32, of queries at the positions ``at [T]`` over all keys, from the rule alone."""
    keys = torch.arange(k.shape[2])
    age = at[:, None] - keys
    mask = (age >= 0) & ((keys < settings.sink) | (age < settings.recent))
    q = q.float()
    k = k.float()
    v = v.float()
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def check_same(what: str, got: Tensor, want: Tensor, word: str, loosen: float = 1.0) -> float:
    """The error of ``got``; columns that compute different things must not be compared.

    Args:
        loosen: times the tolerance of the dtype that is allowed.

    Raises:
        LongCtxError: the error is above that.
    """
    allowed = loosen * TOLERANCE[word]
    got = got.float()
    want = want.float()
    error = ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
    if not error <= allowed:
        raise LongCtxError(
            f"{what} differs by {error:.1e} of its largest value in {word}, more than {allowed:.0e}: the "
            "columns do not compute the same, so their times mean nothing. Please report this with your versions."
        )
    return error
