"""The ``model`` section of a config: what tells the checkpoint that it fits."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

from .bounds import COUNT, FREE, MOST_HEADS, MOST_LAYERS, TOKENS
from .words import short, wrong

# rope_types
UNSCALED = "default"
FULL = "full_attention"  # in the layer_types of Transformers
SCALINGS = ("linear", "dynamic", "yarn")
ELEMENTS = {**COUNT, "unit": "elements"}
LAYER = {"min": 0, "max": MOST_LAYERS - 1, "unit": "layer index"}
LAYERS = {"min": 1, "max": MOST_LAYERS, "unit": "layers"}
HEADS = {"min": 1, "max": MOST_HEADS, "unit": "heads"}


@dataclass(frozen=True)
class Fingerprint:
    """Sizes that distinguish checkpoints with the same head dimensions; what is absent is not checked.

    Attributes:
        hidden_size: elements of a hidden state.
        intermediate_size: elements of the MLP's inner state.
        vocab_size: tokens of the embedding.
        rope_theta: base of the rotary positions.
        rope_type: how the rotary positions are scaled, ``default`` for not at all.
    """

    hidden_size: int | None = field(default=None, metadata=ELEMENTS)
    intermediate_size: int | None = field(default=None, metadata=ELEMENTS)
    vocab_size: int | None = field(default=None, metadata={**COUNT, "unit": "tokens"})
    rope_theta: float | None = field(default=None, metadata={"above": 0.0, "max": 1e18})
    rope_type: str | None = None


@dataclass(frozen=True)
class ModelSection:
    """What a config fits.

    Attributes:
        model_type: the family, as in the model's own config.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: number of query heads per layer.
        num_key_value_heads: number of KV heads per layer.
        head_dim: size of one head's key vector.
        ids: names of the checkpoints, as on the hub, by which ``auto`` finds the config; ignored at run time.
        full_attention_layers: the layers whose heads read the whole text in the model itself, in order; only these
            have roles. None: all of them, or it is not known.
        max_position_embeddings: tokens that the first of the checkpoints was made for, which ``plan`` reports; ignored
            at run time.
        fingerprint: distinguishes checkpoints of equal dimensions.
    """

    model_type: str
    num_hidden_layers: int = field(metadata=LAYERS)
    num_attention_heads: int = field(metadata=HEADS)
    num_key_value_heads: int = field(metadata=HEADS)
    head_dim: int = field(metadata={**ELEMENTS, "max": 65536})
    ids: tuple[str, ...] = field(default=(), metadata=FREE)
    max_position_embeddings: int | None = field(default=None, metadata={**TOKENS, **FREE})
    full_attention_layers: tuple[int, ...] | None = field(default=None, metadata=LAYER)
    fingerprint: Fingerprint = Fingerprint()

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise wrong("num_key_value_heads", self.num_key_value_heads, f"a divisor of {self.num_attention_heads}")
        own = self.full_attention_layers
        if own is not None and (list(own) != sorted(set(own)) or not own or own[-1] >= self.num_hidden_layers):
            layers = f"some of the layers 0 to {self.num_hidden_layers - 1}, each once and in order"
            raise wrong("full_attention_layers", own, layers)

    def mismatches(self, hf_config: Any) -> list[str]:
        """What disagrees with a Transformers config, one text per key; empty if it fits."""
        theirs = model_facts(hf_config)
        scaled = self.rope_note(hf_config) is not None
        pairs = [(f.name, getattr(self, f.name), theirs[f.name]) for f in fields(self) if f.name in theirs]
        known = self.full_attention_layers is not None  # configs from before this key do not say it
        pairs = [pair for pair in pairs if pair[0] != "fingerprint" and (known or pair[0] != "full_attention_layers")]
        for f in fields(self.fingerprint):
            mine = getattr(self.fingerprint, f.name)
            if mine is not None and not (scaled and f.name == "rope_type"):
                pairs.append((f"fingerprint.{f.name}", mine, theirs["fingerprint"].get(f.name)))
        return [f"{name} {short(mine)} (model: {short(other)})" for name, mine, other in pairs if mine != other]

    def as_model(self) -> Any:
        """What a Transformers config says of itself where this section fits it, for ``mismatches``."""
        apart = ("ids", "fingerprint", "full_attention_layers")
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        if (own := self.full_attention_layers) is not None:
            facts["layer_types"] = [FULL if i in own else "other" for i in range(self.num_hidden_layers)]
        told = {f.name: getattr(self.fingerprint, f.name) for f in fields(self.fingerprint)}
        rope = {key: told.pop(key) for key in ("rope_theta", "rope_type")}
        return SimpleNamespace(**facts, **told, rope_parameters={k: v for k, v in rope.items() if v is not None})

    def rope_note(self, hf_config: Any) -> str | None:
        """In words that the model's owner scaled its RoPE since the heads were measured; None where that is not so.

        It is the same checkpoint: Qwen2.5 is to be used with ``yarn`` beyond 32768 tokens.
        """
        mine = self.fingerprint.rope_type
        theirs = model_facts(hf_config)["fingerprint"].get("rope_type")
        if mine != UNSCALED or theirs not in SCALINGS:
            return None
        return f"rope_type {theirs}: the heads were measured with rope_type {mine}, before the model's RoPE was scaled"


def text_config(hf_config: Any) -> Any:
    """The part of a Transformers config that says how text is read: itself, but for a multimodal model's."""
    inner = getattr(hf_config, "get_text_config", None)
    try:
        return hf_config if inner is None else inner(decoder=True)
    except ValueError:  # it has several such parts, so it is no language model
        return hf_config


def made_for(hf_config: Any) -> int | None:
    """Tokens of the longest text that a model was made for; None where its Transformers config does not say it."""
    return getattr(text_config(hf_config), "max_position_embeddings", None)


def model_facts(hf_config: Any) -> dict[str, Any]:
    """The ``model`` section of a Transformers config as plain data. What is absent there is None, or no fingerprint."""
    hf_config = text_config(hf_config)
    heads = getattr(hf_config, "num_attention_heads", None)
    hidden = getattr(hf_config, "hidden_size", None)
    rope = getattr(hf_config, "rope_parameters", None) or {}
    rope = rope.get("full_attention") or rope
    scaling = getattr(hf_config, "rope_scaling", None) or {}
    theta = rope.get("rope_theta", getattr(hf_config, "rope_theta", None))
    kind = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    finger = {key: getattr(hf_config, key, None) for key in ("hidden_size", "intermediate_size", "vocab_size")}
    finger |= {"rope_theta": None if theta is None else float(theta), "rope_type": None if theta is None else kind}
    head_dim = getattr(hf_config, "head_dim", None)
    layers = getattr(hf_config, "num_hidden_layers", None)
    full = tuple(i for i, kind in enumerate(getattr(hf_config, "layer_types", None) or ()) if kind == FULL)
    return {
        "model_type": getattr(hf_config, "model_type", None),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(hf_config, "num_key_value_heads", None) or heads,
        "head_dim": head_dim if head_dim is not None or not heads or not hidden else hidden // heads,
        "full_attention_layers": full if full and len(full) != layers else None,
        "fingerprint": {key: value for key, value in finger.items() if value is not None},
    }
