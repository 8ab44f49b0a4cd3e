"""The layers of a LongCtxCache that Transformers goes on computing: linear attention, chunked attention.

They are Transformers' own cache layers, as ``DynamicCache`` has them, at their place in ``cache.layers``::

    model     linear   linear   linear   full attention   linear ...
    layers    Linear   Linear   Linear   LongCtxLayer     Linear ...

A linear layer holds states of constant size instead of keys, and does not count tokens. What is needed here of such a
layer is known from its attributes: tensors, and dicts of tensors (`tensors_of`), all with the sequences first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..errors import CacheError, UnsupportedModelError
from .bytes import storage_bytes
from .layer import LongCtxLayer


def stock_layers(config: Any, own: set[int]) -> dict[int, Any]:
    """Layer index -> an empty cache layer of Transformers, for the layers of a text config that are not ``own``.

    Raises:
        UnsupportedModelError: this Transformers would keep keys there, so it has the states in a cache of another kind.
    """
    others = set(range(config.num_hidden_layers)) - own
    if not others:
        return {}
    layers = DynamicCache(config=config).layers
    dense = [index for index in sorted(others) if type(layers[index]) is DynamicLayer]
    if dense:
        raise UnsupportedModelError(
            f"layer {dense[0]} of this {config.model_type} is no attention over the whole text, and this version of "
            "Transformers keeps what it remembers in a cache of its own. Install a newer one."
        )
    return {index: layers[index] for index in sorted(others)}


def named_tensors(layer: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor ``[B, ...]``) of all that a layer holds; numbers that it keeps as tensors are left out."""
    for name, value in vars(layer).items():
        for key, one in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(one, Tensor) and one.dim():
                yield f"{name}.{key}" if isinstance(value, dict) else name, one


def tensors_of(layer: Any) -> Iterator[Tensor]:
    """The tensors of any cache layer, of ours or of Transformers."""
    if isinstance(layer, LongCtxLayer):
        yield from layer.tensors()
    else:
        yield from (tensor for _, tensor in named_tensors(layer))


def changed(layer: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    """A copy of a layer of Transformers with ``change(name, tensor)`` in place of each tensor."""
    other = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            held = {f"{name}.{key}": (key, one) for key, one in value.items()}
            setattr(other, name, {key: _changed(path, one, change) for path, (key, one) in held.items()})
        else:
            setattr(other, name, _changed(name, value, change))
    return other


def _changed(name: str, value: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    return change(name, value) if isinstance(value, Tensor) and value.dim() else value


def copied(layer: Any) -> Any:
    """A layer that goes on by itself."""
    return changed(layer, lambda _, tensor: tensor.clone())


def saved_stock(layer: Any) -> Iterator[tuple[str, Tensor]]:
    """What a layer that has read tokens needs to go on: (name, tensor)."""
    for name, tensor in named_tensors(layer):
        if hasattr(layer, "sliding_window"):
            yield name, tensor[:, :, -layer.sliding_window + 1 :]
        elif name.startswith("conv_states."):  # longer where the past is recorded
            yield name, tensor[..., -layer.conv_kernel_size[_key(name, layer.conv_states)] :]
        else:
            yield name, tensor


def stock_shapes(one_token: Any, batch: int, seen: int) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """(name, dtype, shape) of what `saved_stock` gives after ``seen`` tokens of ``batch`` sequences.

    Args:
        one_token: such a layer after one token of one sequence.
    """
    for name, tensor in saved_stock(one_token):
        shape = [batch, *tensor.shape[1:]]
        if hasattr(one_token, "sliding_window"):
            shape[2] = min(seen, one_token.sliding_window - 1)
        yield name, tensor.dtype, tuple(shape)


def restored_stock(one_token: Any, seen: int, read: Callable[[str], Tensor]) -> Any:
    """A layer that holds what was saved after ``seen`` tokens; ``one_token`` as in `stock_shapes`."""
    layer = changed(one_token, lambda name, tensor: read(name).to(tensor.device))
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = seen
    return layer


def _key(name: str, states: dict) -> Any:
    return next(key for key in states if name == f"conv_states.{key}")


class StockLayers:
    """Part of `LongCtxCache`.

    Attributes:
        own: the layers of ours, in order.
        _blank: layer index -> an empty one of Transformers, of the others.
        _read: layer index -> tokens that such a layer has read; its states do not say it.
        _reading: tokens after the forward that runs.
    """

    @property
    def stock(self) -> dict[int, Any]:
        """Layer index -> the layer of Transformers."""
        return {index: self.layers[index] for index in self._blank}

    @property
    def stock_nbytes(self) -> int:
        """Bytes of what they hold."""
        return storage_bytes(tensor for layer in self.stock.values() for tensor in tensors_of(layer))

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """As in Transformers; a layer that decodes changes the state in place and gives none back."""
        self._read[layer_idx] = self._reading
        return super().get_conv_state(layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """As in Transformers."""
        self._read[layer_idx] = self._reading
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """As in Transformers."""
        self._read[layer_idx] = self._reading
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def _change_stock(self, change: Callable[[Tensor], Tensor]) -> None:
        """Give each of their tensors ``[B, ...]`` other sequences."""
        for index, layer in self.stock.items():
            self.layers[index] = changed(layer, lambda _, tensor: change(tensor))

    def _reset_stock(self) -> None:
        """Empty them."""
        for index, layer in self._blank.items():
            self.layers[index] = copied(layer)
        self._read = {}

    def _crop_stock(self, removed: int) -> None:
        """Take the last ``removed`` tokens back, as Transformers does."""
        for index, layer in self.stock.items():
            if removed:
                layer.crop(-removed)
                self._read[index] = self._read.get(index, 0) - removed

    @property
    def _oldest_stock_crop(self) -> int:
        """Fewest tokens that all of them can still be cropped to."""
        return max((self.seen - _croppable(layer, self.seen) for layer in self.stock.values()), default=0)

    def _refuse_ahead(self) -> None:
        """Raise CacheError where a forward was interrupted after some of these layers had read its tokens."""
        seen = self.seen
        ahead = [index for index, read in self._read.items() if read != seen]
        if ahead:
            raise CacheError(
                f"layer {ahead[0]} of this cache has read {self._read[ahead[0]]} tokens and the others {seen}: an "
                "earlier forward was interrupted, and a layer without keys cannot go back. Call cache.reset() and read "
                "the prompt again."
            )


def _croppable(layer: Any, seen: int) -> int:
    """How many tokens a layer of Transformers can take back."""
    if hasattr(layer, "conv_states"):  # a state of all tokens; of convolutions alone the last inputs may be kept
        if not (getattr(layer, "record_past", False) and layer.is_croppable):
            return 0
        return min(state.shape[-1] - layer.conv_kernel_size[key] for key, state in layer.conv_states.items())
    if layer.get_seq_length() < layer.sliding_window:
        return seen
    return layer.keys.shape[-2] - (layer.sliding_window - 1) if getattr(layer, "record_past", False) else 0
