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

from ..config.bounds import MOST
from ..config.model import model_facts
from ..errors import CacheError, LongCtxError
from ..io import tensor_file
from ..io.atomic import check_place, written_whole
from ..io.tensor_file import TensorFile
from ..layout.forward import ForwardLog
from ..layout.rows import Rows
from ..stores._saved import SavedTensors, Told, short
from . import selections
from .described import check_layers, check_same, describe
from .fingerprint import fingerprint
from .finite import is_finite
from .layer import SAVED as LAYER_SAVED
from .seam import CACHE
from .stock_layers import restored_stock, saved_stock, stock_shapes
from .surprisals import NAMES as SURPRISALS
from .weights import device_of

FORMAT = "hf_longctx cache"
VERSION = 2
READS = ("1", str(VERSION))  # in 1 the history of a ring has all its slots at once
STOCK = "stock"  # begins the names of tensors of layers that are not ours: "stock.0.conv_states.0"
IDS = "ids"  # the tensor of token ids; those of layers are "layers.0.streaming...."
SAVED = ("starts", "ends", "staggered")  # attributes of the cache itself
AHEAD = "ahead"  # one more, where it is not None
MOMENT = ("prompt_end", "reading")  # two more, of a cache of which tokens are evicted
PRIVATE = 0o600  # the file holds somebody's text
BIAS = ".bias"  # ends the names of tensors that may hold -inf

AnyCache = TypeVar("AnyCache")


def save(cache: Any, path: str | os.PathLike, ids: Tensor | None, model: nn.Module | None) -> None:
    """See ``LongCtxCache.save``."""
    cache.check()
    if not cache.seen:
        raise CacheError("this cache is empty: there is nothing to save. Run the model with it first.")
    path = _file_path(path)
    base = _filled_by(cache, model)
    told = {
        "model": fingerprint(base),
        "layers": [describe(plan) for plan in cache.plans],
        "max_tokens": cache.max_tokens,
        "cache": {name: getattr(cache, name) for name in _names(cache, bool(cache.ahead))},
        "kept": [],
    }
    tensors = {IDS: _ids_of(cache, ids, _known_ids(base)).to(torch.int32)}
    if cache.surprisals is not None:
        cache.losses()  # all are known
        tensors |= cache.surprisals.saved(cache.seen)
    for number, layer in enumerate(cache.own):
        kept, plain = layer.saved(cache.starts)
        tensors |= {f"layers.{number}.{name}": tensor for name, tensor in kept.items()}
        told["kept"].append(plain)
    for index, layer in cache.stock.items():
        tensors |= {f"{STOCK}.{index}.{name}": tensor for name, tensor in saved_stock(layer)}
    metadata = {"format": FORMAT, "version": str(VERSION), "told": json.dumps(told)}
    try:
        with written_whole(path, PRIVATE) as unfinished, unfinished.open("wb") as file:
            tensor_file.write(file, tensors, metadata, partial(_check_finite, "this cache"))
    except OSError as error:
        raise CacheError(
            f"{path} cannot be written ({error}). What was there before is as it was, and so is the cache: free some "
            "room, or save to another folder."
        ) from error


def _names(cache: Any, ahead: bool) -> tuple[str, ...]:
    """The attributes of the cache itself that a file has."""
    return (*SAVED, *((AHEAD,) if ahead else ()), *(MOMENT if cache.evicts else ()))


def _file_path(path: str | os.PathLike) -> Path:
    try:
        if b"\0" in os.fsencode(path) or not Path(path).name:
            raise ValueError("it names no file")
        check_place(Path(path))
    except (ValueError, FileExistsError) as error:  # or it has letters that the file system has no bytes for
        raise CacheError(f"path: got {str(path)!r}, expected the name of a file to write ({error}).") from None
    return Path(path)


def load(path: str | os.PathLike, model: nn.Module, make: type[AnyCache]) -> AnyCache:
    """See ``LongCtxCache.load``; ``make`` is that class."""
    if not isinstance(model, nn.Module):
        given = type(model).__name__
        raise CacheError(f"model: got {given}, expected a patched model: LongCtxCache.load(path, model).")
    base = make(model).model()
    file = TensorFile(Path(path), partial(_check_finite, str(path)))
    try:
        told = _told(file).fields("model", "layers", "max_tokens", "cache", "kept")
        check_same(told["model"], "was made with another model", json.loads(json.dumps(fingerprint(base))))
        cache = make(model, None if told["max_tokens"].value is None else told["max_tokens"].number(1))
        check_layers(told["layers"], [describe(plan) for plan in cache.plans])
        one_token = _one_token(make(model), base)
        saved = _check(cache, told, file, base, one_token)
        _fill(cache, told["kept"].value, saved, file, base)
        for index, layer in one_token.items():
            cache.layers[index] = restored_stock(layer, cache.seen, lambda name, at=index: file[f"{STOCK}.{at}.{name}"])
            cache._read[index] = cache.seen
    except RecursionError:
        raise CacheError(f"{path} is no file that cache.save wrote: what it says is nested too deeply.") from None
    except (MemoryError, RuntimeError) as error:  # torch's own where it gets no memory; all else was checked
        if isinstance(error, LongCtxError):
            raise
        raise CacheError(
            f"there is no memory for the cache in {path} ({error}). Free some and load it again."
        ) from error
    return cache


def _one_token(cache: Any, base: nn.Module) -> dict[int, Any]:
    """Layer index -> what a layer of Transformers holds after one token of one sequence, which says its shapes."""
    if not cache._blank:
        return {}
    state = base.longctx_state
    before = dict(vars(state))
    state.log = ForwardLog()
    try:
        with torch.no_grad():
            device = device_of(base.get_input_embeddings(), base)
            base(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), **{CACHE: cache}, use_cache=True)
    finally:
        vars(state).update(before)  # nobody asked for this forward
    return cache.stock


def _check(
    cache: Any, told: Mapping[str, Told], file: TensorFile, base: nn.Module, one_token: Mapping[int, Any]
) -> dict[str, Any]:
    """Raise CacheError unless the file can be one of this cache; attributes of the cache itself as it gives them.

    Nothing was allocated before, and no tensor was read but ids and indices, whose numbers are checked.
    """
    layers = [
        layer.fields(*LAYER_SAVED, "dtype", "stores", *(selections.NAME for _ in own.remembering))
        for own, layer in zip(cache.own, told["kept"].items(len(cache.own)), strict=True)
    ]
    seen = layers[0]["seen"].number(1, cache.max_tokens or MOST)
    batch = layers[0]["batch"].number(1)
    tensors = SavedTensors(str(file.path), file.shapes, file.__getitem__)
    tensors.check(IDS, torch.int32, batch, seen)
    known = _known_ids(base)
    if not _within(file[IDS], known):
        Told(tensors.path, f"tensor {IDS}", None).refuse(f"ids are not all from 0 to {known - 1}, those of this model")
    if cache.surprisals is not None:
        tensors.check(SURPRISALS[0], torch.float32, batch, seen)
        tensors.floating(SURPRISALS[1], batch, 1, base.config.hidden_size)
    saved = _check_rows(told["cache"], batch, seen, cache)
    rows = Rows(batch, 0, seen, saved["starts"], saved["ends"])
    facts = model_facts(base.config)
    group = facts["num_attention_heads"] // facts["num_key_value_heads"]
    shape = {"head_dim": facts["head_dim"], "group": group}
    for number, (layer, plain) in enumerate(zip(cache.own, layers, strict=True)):
        layer.check(plain, tensors, f"layers.{number}.", rows, **shape, staggered=saved["staggered"])
    for index, layer in one_token.items():
        for name, dtype, shape in stock_shapes(layer, batch, seen):
            tensors.check(f"{STOCK}.{index}.{name}", dtype, *shape)
    tensors.close()
    return saved


def _check_rows(told: Told, batch: int, seen: int, cache: Any) -> dict[str, Any]:
    """Starts and ends of the rows (slots, or None where all are alike), whether they were staggered, and positions.

    Of a cache of which tokens are evicted also where its prompt ends.
    """
    moves = isinstance(told.value, dict) and AHEAD in told.value
    told = told.fields(*_names(cache, moves))
    ahead = tuple(one.number(-seen, MOST) for one in told[AHEAD].items(batch)) if moves else None
    moment = {}
    if cache.evicts:
        end = told["prompt_end"]
        moment["prompt_end"] = None if end.value is None else end.number(0)
        moment["reading"] = told["reading"].one_of(False, True)
    starts, ends = (
        None if told[name].value is None else tuple(one.number(0, seen) for one in told[name].items(batch))
        for name in ("starts", "ends")
    )
    if any(start > end for start, end in zip(starts or (), ends or (), strict=False)):
        told["ends"].refuse(f"got {short(ends)}, expected none before the row's start in {short(starts)}")
    staggered = told["staggered"].one_of(*((False,) if starts is None else (False, True)))
    return {"starts": starts, "ends": ends, "staggered": staggered, AHEAD: ahead, **moment}


def _fill(cache: Any, told: list[dict], saved: Mapping[str, Any], file: TensorFile, base: nn.Module) -> None:
    """Copy what `_check` found right."""
    devices = {
        module.longctx_plan.layer_idx: device_of(module, base)
        for module in base.modules()
        if "longctx_plan" in vars(module)
    }
    for number, (layer, plain) in enumerate(zip(cache.own, told, strict=True)):
        layer.restore(lambda name, at=number: file[f"layers.{at}.{name}"], plain, devices[layer.plan.layer_idx])
    vars(cache).update(saved)
    device = device_of(base.get_input_embeddings(), base)
    cache.token_ids.append(0, file[IDS].to(device))
    if cache.surprisals is not None:
        cache.surprisals.restore(*(file[name].to(device) for name in SURPRISALS))


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


def _ids_of(cache: Any, given: Tensor | None, vocabulary: int) -> Tensor:
    known = cache.ids
    shape = (cache.batch_size, cache.seen)
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
    if not _within(given, vocabulary):
        raise CacheError(f"ids are not all from 0 to {vocabulary - 1}, those that this model has embeddings for.")
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


def _known_ids(base: nn.Module) -> int:
    """How many ids the model has a row of its embeddings for."""
    return getattr(base.get_input_embeddings(), "num_embeddings", None) or base.config.vocab_size


def _within(ids: Tensor, known: int) -> bool:
    low, high = torch.aminmax(ids)
    return bool(low >= 0) and bool(high < known)


def _told(file: TensorFile) -> Told:
    metadata = file.metadata
    if metadata.get("format") != FORMAT:
        raise CacheError(f"{file.path} is no file that cache.save wrote. Give one that is.")
    if metadata.get("version") not in READS:
        raise CacheError(
            f"{file.path} has format {metadata.get('version', '')[:9]}, this version of hf_longctx reads "
            f"{' and '.join(READS)}. "
            "Update it, or read the prompt again and save."
        )
    try:
        return Told(str(file.path), "file", tensor_file.plain(metadata["told"]))
    except (KeyError, ValueError) as error:
        raise CacheError(f"{file.path} is no file that cache.save wrote ({error}). Save the cache again.") from None
