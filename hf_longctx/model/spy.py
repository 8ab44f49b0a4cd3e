"""What a model asks of its attention function, seen in one forward, and the record of a family that says the same."""

from __future__ import annotations

import inspect
import re
from typing import Any, NamedTuple, Self

from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from ..cache.seam import CACHE
from .attention import KNOWN
from .family import SLIDING, Family

NAME = "longctx_spy"
SCORES = {"softcap": "softcap", "s_aux": "sinks"}
PLACE = re.compile(r"(\w+)\.\d+\.(\w+)")


class Call(NamedTuple):
    """One call of the attention function.

    Attributes:
        place: path of the attention module in the base model.
        layer: its ``layer_idx``.
        window: tokens of a window that it, or its mask, was given.
        asked: keywords that mean something and are not known.
        cached: the keys and values are what the cache's ``update`` returned for this layer.
        own_mask: the mask was not made by Transformers' mask functions.
        heads: query heads.
        kv_heads: (number of KV heads, head dimension).
    """

    place: str
    layer: int | None
    window: int | None
    asked: frozenset[str]
    cached: bool
    own_mask: bool
    heads: int
    kv_heads: tuple[int, int]


class Spy:
    """``with Spy(model) as spy:``; what the model computes inside is meaningless: its attention gives zeros.

    Its function has a name in Transformers' registries only inside.

    Attributes:
        cache: what the model is to be given as its cache.
        calls: one for each call of the attention function, in order.
    """

    def __init__(self, model: PreTrainedModel):
        self.configs = {id(one.config): one.config for one in model.modules() if hasattr(one, "config")}
        self.places = {module: name for name, module in model.named_modules()}
        self.cache = DynamicCache(config=model.config)
        self.masks: dict[int, tuple[Tensor, int | None]] = {}  # by the address of its numbers: and the window it shows
        self.returned: dict[int, tuple[Tensor, Tensor]] = {}
        self.calls: list[Call] = []
        self._update = self.cache.update
        self.cache.update = self.update

    def __enter__(self) -> Self:
        AttentionInterface.register(NAME, self.attend)
        AttentionMaskInterface.register(NAME, self.mask)
        self._set(NAME)
        return self

    def __exit__(self, *exc: object) -> None:
        for interface in (AttentionInterface, AttentionMaskInterface):
            del interface._global_mapping[NAME]
        self._set("eager")

    def _set(self, name: str) -> None:
        for config in self.configs.values():
            config._attn_implementation = name

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.returned[layer_idx] = self._update(key, value, layer_idx, *args, **kwargs)
        return self.returned[layer_idx]

    def mask(self, *args: Any, **kwargs: Any) -> Tensor | None:
        mask = ALL_MASK_ATTENTION_FUNCTIONS["eager"](*args, **kwargs)
        if mask is not None:
            self.masks[mask.data_ptr()] = (mask, kwargs.get("local_size"))
        return mask

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer = getattr(module, "layer_idx", None)
        mask, shown = (
            (None, None) if attention_mask is None else self.masks.get(attention_mask.data_ptr(), (None, None))
        )
        own_mask = attention_mask is not None and mask is None
        window = kwargs.pop("sliding_window", None)
        window = shown if window is None else window
        usual = {*KNOWN, "scaling", "dropout"}
        asked = frozenset(name for name, given in kwargs.items() if given is not None and name not in usual)
        k, v = self.returned.get(layer, (None, None))
        cached = key is k and value is v
        place = self.places.get(module, "")
        batch, heads, tokens, dim = query.shape
        self.calls.append(Call(place, layer, window, asked, cached, own_mask, heads, (key.shape[1], dim)))
        return query.new_zeros(batch, tokens, heads, value.shape[-1]), None


def candidate(spy: Spy, model: PreTrainedModel) -> Family | str:
    """The record that says what was seen; or, in words, why there is none."""
    if not spy.calls:
        return _own_code(model)
    sliding, calls = _sliding(spy.calls, model.config)
    if (reason := _unsaid(calls, spy)) is not None:
        return reason
    if sliding is None:
        windows = ", ".join(f"{one.layer}: {one.window}" for one in calls)
        return f"its layers see windows (layer: tokens, {windows}) that neither sliding_window nor layer_types says"
    attention = model.get_submodule(calls[0].place)
    name = type(attention).__name__
    places = {place.groups() if (place := PLACE.fullmatch(one.place)) else () for one in calls}
    if len(places) != 1 or () in places:
        return (
            f"its attention is at '{calls[0].place}' of the {type(model).__name__}, and a record can only say "
            "'LAYERS[i].ATTENTION'"
        )
    layers, place = places.pop()
    beside = {
        type(one).__name__
        for layer in getattr(model, layers)
        if not hasattr(one := getattr(layer, place, attention), "layer_idx")
    }
    if beside:
        return f"its layers keep something else ({', '.join(sorted(beside))}) where others keep their attention"
    if CACHE not in inspect.signature(type(attention).forward).parameters:
        return f"the forward of its {name} takes no '{CACHE}'"
    if (projection := _key_projection(attention, calls[0])) is None:
        return f"its {name} has no projection that makes the keys; it has {', '.join(attention._modules) or 'none'}"
    scores = {name: SCORES[name] for one in calls for name in sorted(one.asked)}
    return Family(model.config.model_type, layers, place, projection, sliding, scores)


def _own_code(model: PreTrainedModel) -> str:
    """Why the attention function was never called."""
    own = sorted({type(one).__name__ for one in model.modules() if "Attention" in type(one).__name__})
    if not own:
        return "none of its layers is attention over the text, so no head can have a role"
    return f"its attention ({', '.join(own)}) is computed in its own code, past Transformers' attention interface"


def _unsaid(calls: list[Call], spy: Spy) -> str | None:
    """What was seen and no record can say."""
    asked = sorted(frozenset().union(*(call.asked for call in calls)) - SCORES.keys())
    if asked:
        return f"it asks its attention function for {', '.join(asked)}, which patched attention does not compute"
    if any(call.layer is None for call in calls):
        return f"its attention at '{next(one.place for one in calls if one.layer is None)}' has no layer_idx"
    if any(call.own_mask for call in calls):
        return "it makes attention masks of its own, which ask for more than causal attention over padded sequences"
    if len({call.kv_heads for call in calls}) > 1:
        return "its layers have different numbers or sizes of KV heads"
    if shared := [call.layer for call in calls if call.layer not in spy.returned]:
        return f"its layers {shared} cache no keys and values: they read those of other layers"
    if states := [call.layer for call in calls if hasattr(spy.cache.layers[call.layer], "conv_states")]:
        return f"its layers {states} keep states of linear attention beside keys and values"
    if other := {call.layer for call in calls if not call.cached}:
        return f"its layers {sorted(other)} hand other keys and values to the attention function than those they cached"
    return None


def _sliding(calls: list[Call], config: Any) -> tuple[SLIDING | None, list[Call]]:
    """The word of `Family.sliding` that gives layers the windows they were seen with, and the calls of the patched.

    None, and all calls, where no word does.
    """
    words = ["layer_types"] if getattr(config, "layer_types", None) else []
    words += ["all", "none"] if getattr(config, "sliding_window", None) else ["none"]
    for word in words:
        family = Family(config.model_type, sliding=word)
        own = [call for call in calls if call.layer is not None and family.has_roles(config, call.layer)]
        if own and all(family.window(config, call.layer) == call.window for call in own):
            return word, own
    return None, calls


def _key_projection(attention: nn.Module, call: Call) -> str | None:
    """The attribute that makes the keys, alone or together with queries and values."""
    kv_heads, dim = call.kv_heads
    fused = (call.heads + 2 * kv_heads) * dim
    sizes = {
        name: getattr(part, "out_features", getattr(part, "nf", None)) for name, part in attention.named_children()
    }
    if "k_proj" in sizes:
        return "k_proj"
    fits = [name for name, size in sizes.items() if size == fused or (size == kv_heads * dim and "k" in name.lower())]
    return next(iter(fits), None)
