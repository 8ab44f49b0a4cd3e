"""A model type without a record is tried out on a tiny random copy; what that shows is what the error says.

The copy is made from the config alone: no weight of the model is read, and neither the model, nor what is registered,
nor the state of the random numbers is another afterwards. Nothing is ever patched on a guess.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..cache.cache import LongCtxCache
from ..cache.seam import CACHE
from ..config.config import LongCtxConfig
from ..errors import LongCtxError, UnsupportedModelError
from .family import Family, no_record
from .spy import Spy, candidate
from .tiny import VOCAB, tiny_copy

TOKENS = 48
UNCACHED = "without a cache"  # as in training: its keywords alone tell a layer where the sequences start
# How the patched copy reads the text: tokens of each forward, and pads before it. It is to give what one forward gives.
WAYS = {
    "in one forward": ((TOKENS,), 0),
    "in chunks": ((17, 20, 11), 0),
    "decoded": ((44, 1, 1, 1, 1), 0),
    "left-padded": ((TOKENS, 5), 5),
    UNCACHED: ((TOKENS + 5,), 5),
}
FIRST_ID = 5  # what stands below is special in some vocabulary
DTYPE = torch.float32  # eager attention computes its softmax in it, and experts are multiplied in nothing wider
EQUAL = 1e-4  # of the largest value
# What the code of a foreign model can raise at tiny sizes, and what a patch refuses.
FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
FAULTS += (StrictDataclassError, LongCtxError)
INSTEAD = "Run it without patch_model; `hf-longctx configs models` lists the types that work"


def refusal(base: PreTrainedModel, patch: Callable[[nn.Module, LongCtxConfig, Family], None]) -> UnsupportedModelError:
    """The error for a model whose type has no record: what a tiny copy of it shows, and how to go on.

    Args:
        base: the base model that reads the text; only its class and its config are looked at.
        patch: patches a model with a config and a record that need not be registered.
    """
    model_type = base.config.model_type
    if (reason := _by_config(base.config)) is not None:
        return UnsupportedModelError(f"model_type '{model_type}' cannot be patched: {reason}. {INSTEAD}.")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.default_generator.manual_seed(0)
        return _tried(base, model_type, patch)


def _by_config(config: Any) -> str | None:
    """Why no copy needs to be tried."""
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, and heads have roles in a decoder that reads the whole text"
    if getattr(config, "kv_lora_rank", None):
        return (
            "it has multi-head latent attention (kv_lora_rank in its config), where keys and values of all heads share "
            "one compressed vector, so there is no KV head to give a role"
        )
    return None


def _tried(base: PreTrainedModel, model_type: str, patch: Callable) -> UnsupportedModelError:
    try:
        config = tiny_copy(base.config, initializer_range=0.3)  # weights large enough for attention to matter
        tiny = type(base)._from_config(config, dtype=DTYPE, attn_implementation="eager").eval()
        ids = torch.randint(FIRST_ID, VOCAB - 32, (1, TOKENS))
        _run(tiny, ids, (TOKENS,), 0, DynamicCache(config=config))
    except FAULTS as error:
        return UnsupportedModelError(no_record(model_type, f"A tiny copy of it could not be tried: {_told(error)}"))
    try:
        with Spy(tiny) as spy:
            tiny(input_ids=ids, use_cache=True, **{CACHE: spy.cache})
        found = candidate(spy, tiny)
    except FAULTS as error:
        found = f"a tiny random copy of it does not run with another attention function: {_told(error)}"
    if isinstance(found, Family):
        found = _compared(tiny, ids, found, patch)
    if isinstance(found, str):
        return UnsupportedModelError(f"model_type '{model_type}' cannot be patched: {found}. {INSTEAD}.")
    return _would_work(*found)


def _run(model: PreTrainedModel, ids: Tensor, cuts: tuple[int, ...], pads: int, cache: Any) -> Tensor:
    """The last hidden states ``[1, T, hidden]`` of the text, read in parts, with pads before it."""
    whole = nn.functional.pad(ids, (pads, 0))
    mask = nn.functional.pad(torch.ones_like(ids), (pads, 0))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    placed = pads and "position_ids" in inspect.signature(model.forward).parameters
    outs: list[Tensor] = []
    for end, part in zip(itertools.accumulate(cuts), whole.split(cuts, dim=1), strict=True):
        more = {"position_ids": positions[:, end - part.shape[1] : end]} if placed else {}
        more |= {"attention_mask": mask[:, :end]} if pads else {}
        more |= {CACHE: cache} if cache is not None else {}
        outs.append(model(input_ids=part, use_cache=cache is not None, **more)[0])
    return torch.cat(outs, dim=1)[:, pads:]


def _compared(tiny: PreTrainedModel, ids: Tensor, family: Family, patch: Callable) -> tuple[Family, int, float] | str:
    """The record, layers and largest difference of a copy that is equal; else what differs."""
    patched = copy.deepcopy(tiny)
    largest = 0.0
    when = ""
    try:
        described = LongCtxConfig.describe(tiny.config)
        roles = ["R" * described["num_key_value_heads"]] * described["num_hidden_layers"]
        patch(patched, LongCtxConfig.from_dict({"model": described, "heads": {"roles": roles}}), family)
        for way, how in WAYS.items():
            when = f" when the text is read {way}"
            got = _run(patched, ids, *how, None if way == UNCACHED else LongCtxCache(patched))
            difference = _difference(tiny, ids, how, got)
            if not difference <= EQUAL * got.abs().max().item():
                return (
                    f"a tiny random copy of it, patched as {written(family)}, differs from its eager attention by "
                    f"{difference:.1e}{when}"
                )
            largest = max(largest, difference)
    except FAULTS as error:
        return f"a tiny random copy of it, patched as {written(family)}, does not run{when}: {_told(error)}"
    return family, described["num_hidden_layers"], largest


def _difference(tiny: PreTrainedModel, ids: Tensor, how: tuple[tuple[int, ...], int], got: Tensor) -> float:
    """Largest difference from eager attention, in one forward or the same way, whichever is nearer.

    Some models give something else in chunks or with pads than in one forward, without any patch.
    """
    ways = (((TOKENS,), 0), how)
    return min((_run(tiny, ids, *one, DynamicCache(config=tiny.config)) - got).abs().max().item() for one in ways)


def _would_work(family: Family, layers: int, largest: float) -> UnsupportedModelError:
    record = written(family)
    *ways, last = WAYS
    return UnsupportedModelError(
        f"model_type '{family.model_type}' is not supported yet, but most likely works: a tiny random copy of it "
        f"({layers} layers), patched as {record}, gives what its eager attention gives, read {', '.join(ways)} and "
        f"{last} (largest difference {largest:.0e}). This model was not patched. To go on, say before patch_model:\n\n"
        f"    from hf_longctx import Family, register\n\n    register('family', '{family.model_type}', {record})\n\n"
        f"or in a file hf_longctx/patches/{family.model_type}.py:\n\n"
        f"    from hf_longctx import Family\n\n    FAMILY = {record}\n\n"
        "and compare it with the dense model: hf_longctx.compare(model, prompt)."
    )


def written(family: Family) -> str:
    """The call that makes this record."""
    others = [one for one in dataclasses.fields(family)[1:] if getattr(family, one.name) not in (one.default, {})]
    return f"Family({', '.join([repr(family.model_type), *(f'{x.name}={getattr(family, x.name)!r}' for x in others)])})"


def _told(error: Exception) -> str:
    """The first sentence of an error, not too long."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line.partition('. ')[0][:200].rstrip('.')}"
