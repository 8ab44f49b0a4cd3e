"""What a forward of one chunk of a prompt holds, but for the cache: Transformers' own code, followed without memory.

On the ``meta`` device tensors have sizes and no memory, so a forward of the largest model takes a moment. Every
operation runs, and what it makes is counted for as long as it is referred to. So whatever the layers of a type are made
of is counted as it is: experts with their router and their sorted tokens, fused projections, norms, parallel blocks,
linear attention. The first layers are followed, up to the last kind of layer there is, at two lengths; what is held is
linear in the tokens of a chunk. In the place of the attention function, which is not, stands one that makes a result
and nothing else.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..cache.seam import CACHE
from ..cache.stock_layers import tensors_of
from ..config.model import text_config
from ..errors import UnsupportedModelError
from ..model.family import find_family
from ..model.modules import language_model
from .skeleton import make_skeleton

STAND_IN = "longctx_stand_in"  # the attention implementation of a model that is followed
LENGTHS = 256, 512  # tokens of a chunk that is followed: full blocks of linear attention, which have 64
LARGEST = 1 << 58  # entries of a mask: a tensor cannot have many more


@dataclass(frozen=True)
class Subject:
    """What is followed. One equals another if their Transformers configs say the same."""

    told: str
    dtype: torch.dtype
    batch: int
    dense: Any = field(compare=False)

    @classmethod
    def of(cls, dense: Any, dtype: torch.dtype, batch: int) -> Subject:
        told = json.dumps([dense.to_dict(), text_config(dense)._attn_implementation], sort_keys=True, default=str)
        return cls(told, dtype, batch, dense)


@dataclass(frozen=True)
class Line:
    """Bytes that grow with the tokens of a chunk."""

    constant: float
    per_token: float

    def __call__(self, tokens: int) -> int:
        return math.ceil(self.constant + self.per_token * tokens)


@dataclass(frozen=True)
class Plane:
    """Bytes that grow with the tokens of a chunk, with its keys, and with the product of both."""

    constant: float
    per_token: float
    per_key: float
    per_pair: float

    def __call__(self, tokens: int, keys: int) -> int:
        held = self.constant + self.per_token * tokens + self.per_key * keys + self.per_pair * tokens * keys
        return math.ceil(held)

    @classmethod
    def through(cls, most: Callable[[int, int], int]) -> Plane:
        """The plane of a function of tokens and keys that is one."""
        a, b = LENGTHS
        corner, more, longer, both = most(a, a), most(b, a), most(a, b), most(b, b)
        per_pair = (both - more - longer + corner) / (b - a) ** 2
        per_token = (more - corner) / (b - a) - per_pair * a
        per_key = (longer - corner) / (b - a) - per_pair * a
        return cls(corner - (per_token + per_key + per_pair * a) * a, per_token, per_key, per_pair)


@dataclass(frozen=True)
class Activations:
    """What the layers of a model hold while a chunk is read, in bytes of all sequences, but for the cache.

    Attributes:
        implementation: the attention that Transformers takes for the model, such as ``sdpa``.
        outside: most that is held while no attention function runs.
        attention: most that is held when an attention function has made its result.
        states: layer index -> its layer of a cache after a forward, where it has states; on the meta device.
        eager: what ``eager`` attention holds beside its result; None where the implementation is another.
        weights: those that it returns, which are held until the layer ends.
    """

    implementation: str
    outside: Line
    attention: Line
    states: dict[int, Any]
    eager: Plane | None = None
    weights: Plane | None = None


class Held(TorchDispatchMode):
    """Counts the bytes of what is made inside and still referred to.

    Attributes:
        now, most: bytes.
        attention: most when an attention function has made its result.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.now = self.most = self.attention = 0
        self._storages = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._grouped_mm.default:  # on the meta device it refuses all but bfloat16
            out = args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._made(tensor.untyped_storage())
        self.most = max(self.most, self.now)
        return out

    def _made(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._storages:
            self._storages.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.now -= size

    def attended(self, *_: Any, **__: Any) -> None:
        self.attention = max(self.attention, self.now)


class NoTokens(DynamicCache):
    """A cache that keeps no keys and values, so that those of the chunk alone are counted; it keeps states."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any):
        return key_states, value_states


def activations(subject: Subject) -> Activations:
    """What the layers of a model hold.

    Raises:
        UnsupportedModelError: its forward cannot be followed without its numbers.
    """
    try:
        return _follow(subject)
    except (NotImplementedError, RuntimeError) as error:  # what operations on the meta device raise
        raise UnsupportedModelError(
            f"what {text_config(subject.dense).model_type} holds while a prompt is read cannot be calculated: its "
            f"forward does not run without numbers ({type(error).__name__}: {str(error).splitlines()[0]}). plan and "
            "bench memory are for models whose forward does; report(model) has the bytes of a cache that is held."
        ) from error


def masks(subject: Subject, chunk: int, tokens: int) -> tuple[int, int]:
    """(bytes of the masks of a forward of dense attention, most that is held while they are made).

    Args:
        chunk: tokens of the forward.
        tokens: tokens in the cache after it.
    """
    halvings = 0
    while (chunk >> halvings) * (tokens >> halvings) * subject.batch > LARGEST:  # they grow with both
        halvings += 1
    held, most = _masks(subject, chunk >> halvings, tokens >> halvings)
    return held << 2 * halvings, most << 2 * halvings


@functools.lru_cache(maxsize=64)
def _follow(subject: Subject) -> Activations:
    model, layers = _first_layers(subject, None)
    implementation = language_model(model).config._attn_implementation
    outside, attention = [], []
    for length in LENGTHS:
        cache = NoTokens(config=language_model(model).config)
        held = _held(model)
        with _stand_in(model, held.attended), held:
            _forward(model, subject.batch, length, cache)  # makes the states, which are no activations
            before = held.most = held.attention = held.now
            _forward(model, subject.batch, length, cache)
        outside.append(held.most - before)
        attention.append(held.attention - before)
    of_kind = dict(zip(layers, cache.layers, strict=False))
    states = {index: of_kind[kind] for index, kind in enumerate(layers) if list(tensors_of(of_kind[kind]))}
    eager = _eager(model, subject.batch) if implementation == "eager" else ()
    return Activations(implementation, _line(outside), _line(attention), states, *eager)


@functools.lru_cache(maxsize=512)
def _masks(subject: Subject, chunk: int, tokens: int) -> tuple[int, int]:
    held, most = _before_layers(_first_layer(subject), subject.batch, chunk, tokens)
    return held - _without_masks(subject, chunk), most


@functools.lru_cache(maxsize=512)
def _without_masks(subject: Subject, chunk: int) -> int:
    model = _first_layer(subject)
    with _stand_in(model, None):
        return _before_layers(model, subject.batch, chunk, chunk)[0]


def _first_layers(subject: Subject, count: int | None) -> tuple[PreTrainedModel, list[tuple]]:
    """(the model with its first layers alone: ``count``, or up to the last kind there is; the kinds of all)."""
    model = make_skeleton(subject.dense, subject.dtype)
    base = language_model(model)
    name = find_family(base.config.model_type).layers
    layers = getattr(base, name)
    kinds = [_kind(layer) for layer in layers]
    # Of each kind one that is not the very first: after that the embeddings are held beside a layer's own input.
    seen = [kinds.index(kind, 1) for kind in kinds[1:]]
    setattr(base, name, layers[: count or 1 + max(seen, default=0)])
    return model, kinds


def _kind(layer: nn.Module) -> tuple:
    """What tells a layer from one that holds something else: its modules, their settings, and its parameters' sizes."""
    settings = [
        (name, type(module).__name__, key, value)
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, str)) and key != "layer_idx"
    ]
    return (*settings, *((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()))


@functools.lru_cache(maxsize=8)
def _first_layer(subject: Subject) -> PreTrainedModel:
    """The model with one layer, which hands on what it is given."""
    model, _ = _first_layers(subject, 1)
    (layer,) = getattr(language_model(model), find_family(language_model(model).config.model_type).layers)
    layer.forward = lambda hidden_states, *_, **__: hidden_states
    return model


def _before_layers(model: PreTrainedModel, batch: int, chunk: int, tokens: int) -> tuple[int, int]:
    """(bytes held when the first layer is called, most until then) of a forward behind a cache of other tokens."""
    cache = DynamicCache(config=language_model(model).config)
    kinds = [type(layer) for layer in cache.layers]
    for index in {kinds.index(kind) for kind in kinds}:  # masks are made for the first layer of each kind
        if hasattr(cache.layers[index], "keys") and chunk < tokens:
            cache.update(*(torch.empty(batch, 1, tokens - chunk, 1, device="meta") for _ in "kv"), index)
    held = _held(model)
    found = []
    (layer,) = getattr(language_model(model), find_family(language_model(model).config.model_type).layers)
    hook = layer.register_forward_pre_hook(lambda *_: found.append((held.now, held.most)))
    with held:
        _forward(model, batch, chunk, cache)
    hook.remove()
    return found[0]


@contextmanager
def _stand_in(model: PreTrainedModel, see: Callable[..., Any] | None) -> Iterator[None]:
    """Attention of the model makes a result and nothing else, no mask either; ``see`` is called with its arguments."""

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **kwargs: Any) -> tuple[Tensor, None]:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        see(module, q, k, v, *rest, **kwargs)
        return out, None

    before = language_model(model).config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[STAND_IN] = attend
    try:
        model.set_attn_implementation(STAND_IN)
        yield
        model.set_attn_implementation(before)
    finally:
        del ALL_ATTENTION_FUNCTIONS[STAND_IN]


def _held(model: PreTrainedModel) -> Held:
    """Counts what is made beside the model's own."""
    return Held([*model.parameters(), *model.buffers()])


@torch.no_grad()
def _forward(model: PreTrainedModel, batch: int, length: int, cache: DynamicCache) -> None:
    ids = torch.empty(1, 1, dtype=torch.long, device="meta").expand(batch, length)
    language_model(model)(ids, use_cache=True, **{CACHE: cache})


def _line(most: list[int]) -> Line:
    per_token = (most[1] - most[0]) / (LENGTHS[1] - LENGTHS[0])
    return Line(most[0] - per_token * LENGTHS[0], per_token)


def _eager(model: PreTrainedModel, batch: int) -> Iterator[Plane]:
    """(what the model's eager attention holds beside its result, its weights), by its own code."""
    calls = []
    with _stand_in(model, lambda *args, **kwargs: calls.append((args, kwargs))), Held([]):
        _forward(model, batch, LENGTHS[0], NoTokens(config=language_model(model).config))
    (module, *qkv, _), kwargs = calls[0]
    attend = sys.modules[type(module).__module__].eager_attention_forward

    @torch.no_grad()
    def run(chunk: int, keys: int) -> tuple[int, int]:
        q, k, v = (
            torch.empty(*one.shape[:2], length, one.shape[-1], dtype=one.dtype, device="meta")
            for one, length in zip(qkv, (chunk, keys, keys), strict=True)
        )
        mask = torch.empty(batch, 1, chunk, keys, dtype=q.dtype, device="meta")
        with (held := Held([q, k, v, mask, *model.parameters()])):
            out, weights = attend(module, q, k, v, mask, **kwargs)
        return held.most - out.untyped_storage().nbytes(), weights.untyped_storage().nbytes()

    for part in range(2):
        yield Plane.through(lambda chunk, keys: run(chunk, keys)[part])  # noqa: B023
