"""A measured head map to give away: one JSON with the scores, and all that a reviewer needs to judge and ship them."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig

from ..config import strict_yaml
from ..config.bounds import SCORE, SHARE
from ..config.config import LongCtxConfig
from ..config.find import checkpoint_name
from ..config.hub import COMMIT, repository
from ..config.model import HEADS, LAYERS, text_config
from ..config.sections import check_rows
from ..config.words import build, check_word, convert, dump, make, wrong
from ..errors import ConfigError
from ..io.environment import environment
from ..model.modules import language_model, name_of, unwrap

KINDS = {"duo_gates": "duo_gate"}  # method -> kind of examples/published_heads; of any other the one below
OTHER_KIND = "retrieval_score"
GRANULARITY = "kv_head"
VERSIONS = ("hf_longctx", "torch", "transformers", "python")
EXCERPT = (  # keys of config.json that say which heads there are, and where a layer looks
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "rope_parameters",
    "tie_word_embeddings",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
)
LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+ ()-]{1,79}")
METHOD = re.compile(r"[a-z][a-z0-9_]{0,79}")
DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True)
class Contribution:
    """What the file holds.

    Attributes:
        contribution: version of this form.
        model: hub id of what was measured.
        kind: ``duo_gate`` or ``retrieval_score``, as in ``examples/published_heads``.
        method: the word of the method.
        source: the program that measured.
        paper: where the method comes from.
        licence: of the numbers.
        granularity: ``kv_head``, what a score is of.
        num_layers, num_heads, num_kv_heads: shape of ``values``, and the KV heads per layer.
        values: ``[layers][KV heads]``, higher = more retrieval.
        retrieval_fraction: share of retrieval heads that was chosen or found.
        streaming: the store that streaming heads were measured with.
        confidence: ``low`` where the method had doubts, which are in ``settings``.
        settings: seed, options and figures of the method, and of the search for the share.
        curve: the shares that were measured against the dense model, one mapping each.
        versions: of hf_longctx, torch, transformers and python.
        device: what the model was measured on.
        dtype: of the weights.
        date: of the measurement, in UTC.
        config: the part of config.json that tells the sizes of the model.
        revision: commit of the model; None where it is not known.
    """

    contribution: int = field(metadata={"choices": (1,)})
    model: str
    kind: str = field(metadata={"choices": (OTHER_KIND, *KINDS.values())})
    method: str
    source: str
    paper: str
    licence: str
    granularity: str = field(metadata={"choices": (GRANULARITY,)})
    num_layers: int = field(metadata=LAYERS)
    num_heads: int = field(metadata=HEADS)
    num_kv_heads: int = field(metadata=HEADS)
    values: tuple[tuple[float, ...], ...] = field(metadata=SCORE)
    retrieval_fraction: float = field(metadata=SHARE)
    streaming: dict
    confidence: str = field(metadata={"choices": ("measured", "low")})
    settings: dict
    curve: tuple[dict, ...]
    versions: dict
    device: str
    dtype: str
    date: str
    config: dict
    revision: str | None = None

    def __post_init__(self) -> None:
        check_id(self.model, "model")
        check_licence(self.licence)
        for name, form, fits in (
            ("method", METHOD, "a word such as two_needle"),
            ("date", DATE, "a date such as 2026-01-31"),
            ("revision", COMMIT, "a commit of 40 hexadecimal digits"),
        ):
            value = getattr(self, name)
            if value is not None and not form.fullmatch(value):
                raise wrong(name, value, fits)
        store = build("stores", self.streaming, "store", "streaming", "streaming")
        if dump(store, "store") != dict(self.streaming):
            raise wrong("streaming", self.streaming, f"the store with all of its fields: {dump(store, 'store')}")
        facts = described(self.config)
        for name, key in (("num_layers", "num_hidden_layers"), ("num_kv_heads", "num_key_value_heads")):
            if getattr(self, name) != facts[key]:
                raise wrong(name, getattr(self, name), f"{facts[key]}, as config says")
        if self.num_heads != self.num_kv_heads:
            raise wrong("num_heads", self.num_heads, f"{self.num_kv_heads}, one value per KV head")
        check_rows(self.values, self.num_layers, self.num_heads, "values", "KV heads")
        made = {"model": facts, "heads": {"scores": self.values, "retrieval_fraction": self.retrieval_fraction}}
        LongCtxConfig.from_dict(made)


def contribution(model: nn.Module, config: LongCtxConfig, *, licence: str, model_id: str | None = None) -> dict:
    """What ``identify`` measured, as plain data to write as a JSON and give away; ``docs/heads.md`` says where to.

    Args:
        model: the model that was measured, loaded.
        config: what ``identify`` returned for it.
        licence: of the numbers, as SPDX writes it ("MIT", "CC-BY-4.0"); there is no default.
        model_id: the model's hub id, where it was loaded from a folder.

    Raises:
        ConfigError: no hub id or licence, a config that ``identify`` did not make or made for another model, or a
            model whose sizes its config.json does not tell.
    """
    found = about(model, licence, model_id)
    config.check_model(language_model(model).config)
    heads = config.heads
    if heads.use is not None or heads.scores is None or not {"seed", "options"} <= set(heads.measured):
        raise ConfigError("contribution: got a config that identify did not make; give what it returned.")
    measured = dict(heads.measured)
    curve = measured.pop("curve", [])
    found |= {
        "kind": KINDS.get(heads.source["method"], OTHER_KIND),
        "method": heads.source["method"],
        "source": heads.source["from"],
        "paper": heads.source["paper"],
        "values": heads.scores,
        "retrieval_fraction": heads.retrieval_fraction,
        "streaming": dump(config.stores.streaming, "store"),
        "confidence": heads.confidence,
        "settings": measured,
        "curve": curve,
    }
    return dump(make(Contribution, found, "contribution"))


def about(model: nn.Module, licence: str, model_id: str | None = None) -> dict[str, Any]:
    """The part of a contribution that is known before anything was measured; errors as ``contribution``."""
    check_licence(licence)
    inner = unwrap(model)
    hf_config = language_model(model).config
    name, is_folder = checkpoint_name(name_of(model))
    if model_id is None and (is_folder or not name):
        raise ConfigError(
            f"contribution: the model was loaded from {name!r}, a folder; say its hub id (model_id, or --model-id)."
        )
    check_id(model_id or name, "model_id")
    facts = LongCtxConfig.describe(hf_config)
    weights = next(inner.parameters())
    quantised = getattr(inner.config, "quantization_config", None)
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    known = environment()
    on_gpu = weights.device.type == "cuda"
    return {
        "contribution": 1,
        "model": model_id or name,
        "revision": getattr(inner.config, "_commit_hash", None),
        "licence": licence,
        "granularity": GRANULARITY,
        "num_layers": facts["num_hidden_layers"],
        "num_heads": facts["num_key_value_heads"],
        "num_kv_heads": facts["num_key_value_heads"],
        "versions": {name: known[name] for name in VERSIONS},
        "device": torch.cuda.get_device_name(weights.device) if on_gpu else f"{weights.device.type}: {known['cpu']}",
        "dtype": str(inner.dtype).removeprefix("torch.") + ("" if method is None else f", {str(method)}"),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "config": excerpt_of(hf_config),
    }


def excerpt_of(hf_config: Any) -> dict[str, Any]:
    """The part of a Transformers config that tells the sizes; ConfigError where they do not follow from it.

    Of a multimodal model it is a part of its language model's config.
    """
    told = text_config(hf_config).to_dict()
    excerpt = {key: told[key] for key in EXCERPT if told.get(key) is not None}
    if described(excerpt) != LongCtxConfig.describe(hf_config):
        raise ConfigError(
            f"contribution: a {told['model_type']} made from {', '.join(excerpt)} of its config.json has other sizes."
        )
    return excerpt


def check_id(model_id: object, where: str) -> None:
    """Raise ConfigError unless this is a hub id."""
    named = repository(model_id) if isinstance(model_id, str) else None
    if named is None or named.revision is not None:
        raise wrong(where, model_id, "the id of a model on the Hub, USER/NAME")


def check_licence(licence: object) -> None:
    """Raise ConfigError unless this looks like a licence."""
    if not isinstance(licence, str) or not LICENCE.fullmatch(licence):
        raise wrong("licence", licence, "the licence of the numbers, such as MIT or CC-BY-4.0")


def described(excerpt: dict[str, Any]) -> dict[str, Any]:
    """The ``model`` section of a part of config.json.

    Raises:
        ConfigError: it has another key, or Transformers makes no config of it.
    """
    for key in excerpt:
        check_word(key, EXCERPT, "config")
    # Transformers lists the kind of each layer, however many there are.
    convert(excerpt.get("num_hidden_layers"), int | None, "config.num_hidden_layers", LAYERS)
    try:
        made = AutoConfig.for_model(**copy.deepcopy(excerpt))  # Transformers writes into what it is given
    except (ArithmeticError, AttributeError, LookupError, StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigError(f"config: Transformers makes no config of it: {error}") from None
    return LongCtxConfig.describe(made)


def read(path: Path) -> dict[str, Any]:
    """The contribution of a file, checked whoever wrote it.

    Raises:
        ConfigError: unreadable, too large, no JSON, or not what ``contribution`` writes; the file's name comes first.
    """
    try:
        with path.open("rb") as file:
            text = file.read(strict_yaml.LARGEST_TEXT + 1)
        strict_yaml.check_size(len(text), path.name)
        given = json.loads(text, object_pairs_hook=_once)
    except ConfigError:
        raise
    except (OSError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path.name}: cannot be read: {error}") from None
    return dump(make(Contribution, given, f"{path.name}: contribution"))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The mapping of an object's pairs, in which every key is there once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found
