"""LongCtxCache.save and load: what a cache's file says besides the numbers, and what must be true of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import tensor_file
from .errors import CacheError
from .fingerprint import fingerprint
from .finite import is_finite
from .layer_plan import LayerPlan
from .registry import dump
from .tensor_file import TensorFile
from .whole_file import written_whole

FORMAT, VERSION = "hf_longctx cache", 2
READS = ("1", str(VERSION))  # in 1 the history of a ring has all its slots at once
IDS = "ids"  # the tensor of token ids; those of layers are "layers.0.streaming...."
SAVED = ("starts", "ends", "staggered")  # attributes of the cache itself
BIAS = ".bias"  # ends the names of tensors that may hold -inf

AnyCache = TypeVar("AnyCache")


def save(cache: Any, path: str | os.PathLike, ids: Tensor | None, model: nn.Module | None) -> None:
    """See ``LongCtxCache.save``."""
    cache.check()
    if not cache.seen:
        raise CacheError("this cache is empty: there is nothing to save. Run the model with it first.")
    told = {
        "model": fingerprint(_filled_by(cache, model)),
        "layers": [describe(plan) for plan in cache.plans],
        "max_tokens": cache.max_tokens,
        "cache": {name: getattr(cache, name) for name in SAVED},
        "kept": [],
    }
    tensors = {IDS: _ids_of(cache, ids).to(torch.int32)}
    for number, layer in enumerate(cache.layers):
        kept, plain = layer.saved(cache.starts)
        tensors |= {f"layers.{number}.{name}": tensor for name, tensor in kept.items()}
        told["kept"].append(plain)
    metadata = {"format": FORMAT, "version": str(VERSION), "told": json.dumps(told)}
    try:
        with written_whole(Path(path)) as unfinished, unfinished.open("wb") as file:
            tensor_file.write(file, tensors, metadata, partial(_check_finite, "this cache"))
    except OSError as error:
        raise CacheError(
            f"{path} cannot be written ({error}). What was there before is as it was, and so is the cache: free some "
            "room, or save to another folder."
        ) from error


def load(path: str | os.PathLike, model: nn.Module, make: type[AnyCache]) -> AnyCache:
    """See ``LongCtxCache.load``; ``make`` is that class."""
    if not isinstance(model, nn.Module):
        given = type(model).__name__
        raise CacheError(f"model: got {given}, expected a patched model: LongCtxCache.load(path, model).")
    base, file = make(model).model(), TensorFile(Path(path), partial(_check_finite, str(path)))
    told = _told(file)
    try:
        _check_same(path, "was made with another model", told["model"], json.loads(json.dumps(fingerprint(base))))
        cache = make(model, told["max_tokens"])
        _check_layers(path, told["layers"], [describe(plan) for plan in cache.plans])
        _fill(cache, told, file, base)
    except (KeyError, TypeError) as error:
        raise CacheError(f"{path} lacks something that caches have ({error!r}). Save the cache again.") from error
    return cache


def _fill(cache: Any, told: Mapping[str, Any], file: TensorFile, base: nn.Module) -> None:
    devices = {
        module.longctx_plan.layer_idx: next(module.parameters()).device
        for module in base.modules()
        if "longctx_plan" in vars(module)
    }
    for number, (layer, plain) in enumerate(zip(cache.layers, told["kept"], strict=True)):
        layer.restore(lambda name, at=number: file[f"layers.{at}.{name}"], plain, devices[layer.plan.layer_idx])
    for name in SAVED:
        value = told["cache"][name]
        setattr(cache, name, tuple(value) if isinstance(value, list) else value)
    cache.token_ids.append(0, file[IDS].to(base.get_input_embeddings().weight.device))


def describe(plan: LayerPlan) -> dict[str, Any]:
    """What a layer keeps, as plain data: roles and stores; kernel, prefill patterns and places have no part in it."""
    stores = {heads.role: dump(plan.stores[heads.role], "store") for heads in plan.heads}
    for heads in plan.heads:
        for name in plan.stores[heads.role].places:
            stores[heads.role].pop(name, None)
    return json.loads(json.dumps({"roles": plan.roles, "own window": plan.sliding, "stores": stores}))


def _filled_by(cache: Any, model: nn.Module | None) -> nn.Module:
    """The base model that filled the cache, or ``model``'s, which must be patched alike."""
    if model is not None:
        if type(cache)(model).plans != cache.plans:
            raise CacheError(
                "model: this cache was made for another model or another config. Give the one that made it."
            )
        return type(cache)(model).model()
    base = cache.model() if cache.model is not None else None
    if base is None:
        raise CacheError(
            "it is not known which model filled this cache: it was unpickled or copied, or the model is gone. Pass "
            "cache.save(path, model=model)."
        )
    return base


def _ids_of(cache: Any, given: Tensor | None) -> Tensor:
    known, shape = cache.ids, (cache.batch_size, cache.seen)
    if given is None and known is None:
        raise CacheError(
            "the ids of this cache's tokens are not known (inputs_embeds, or keys written by update). Pass "
            f"cache.save(path, ids=...) with ids of shape {list(shape)}, one for every token seen, pads included."
        )
    if given is None:
        return known
    if tuple(given.shape) != shape or given.is_floating_point():
        raise CacheError(
            f"ids are {given.dtype} of shape {list(given.shape)}; this cache needs whole numbers of shape "
            f"{list(shape)}, one for every token seen, pads included."
        )
    if known is not None and not torch.equal(known, given.to(known)):
        raise CacheError("ids are others than those this cache has seen (cache.ids). Leave ids out.")
    return given


def _check_finite(where: str, name: str, piece: Tensor) -> None:
    if name.endswith(BIAS) or is_finite(piece):
        return
    _, layer, rest = name.split(".", 2)
    raise CacheError(
        f"{where} holds NaN or inf in layer {layer}, {rest} ({piece.dtype}): what is read from it would be wrong. "
        "Load the model in bfloat16 or float32 and read the prompt again; HF_LONGCTX_CHECK=1 finds the first layer."
    )


def _told(file: TensorFile) -> Mapping[str, Any]:
    metadata = file.metadata
    if metadata.get("format") != FORMAT:
        raise CacheError(f"{file.path} is no file that cache.save wrote. Give one that is.")
    if metadata["version"] not in READS:
        raise CacheError(
            f"{file.path} has format {metadata['version']}, this version of hf_longctx reads {' and '.join(READS)}. "
            "Update it, or read the prompt again and save."
        )
    return json.loads(metadata["told"])


def _check_same(path: Any, wrong: str, told: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    differ = [name for name in {**told, **here} if told.get(name) != here.get(name)]
    if differ:
        said = "; ".join(f"{name}: {_short(told.get(name))} there, {_short(here.get(name))} here" for name in differ)
        raise CacheError(f"{path} {wrong} ({said}). Load it with the one that made it, or read the prompt again.")


def _check_layers(path: Any, told: list[dict], here: list[dict]) -> None:
    if len(told) != len(here):
        raise CacheError(f"{path} has {len(told)} layers, this model {len(here)}. Load it with the model that made it.")
    for number, (before, now) in enumerate(zip(told, here, strict=True)):
        _check_same(path, f"was made with another config, layer {number}", before, now)


def _short(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
