"""Rotary positions: how each layer turns its keys, and angles that depend on the length of the text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..cache.seam import CACHE
from ..config.words import load, words
from ..errors import UnsupportedModeError
from ..layout.rotation import Rotation
from ..layout.rows import Rows

BY_LENGTH = ("dynamic", "longrope")  # the rope types of Transformers whose angles depend on the length
TOKEN = 5  # what stands below is special in some vocabulary
AHEAD = 97  # positions: no two sets of frequencies turn a key alike
FITS = 0.02  # of the length of a key: several times what bfloat16 rounds


def length_limit(config: Any) -> tuple[str, int] | None:
    """(rope type, tokens up to which its angles are always the same) of a Transformers config; None: at any length."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention") or rope
    kind = rope.get("rope_type", "default")
    if not any(name in kind for name in BY_LENGTH):
        return None
    limit = rope.get("original_max_position_embeddings") if kind == "longrope" else None
    return kind, limit or config.max_position_embeddings


def check_rotary(config: Any, rows: Rows) -> str | None:
    """A note for the report where one token goes on over keys that were turned by other angles than its own.

    Transformers does so as well when it decodes. A forward of several tokens is what would make the answer depend on
    how a text was cut.

    Raises:
        UnsupportedModeError: it brings several.
    """
    if not rows.past or (found := length_limit(config)) is None:
        return None
    kind, limit = found
    pads = min(rows.starts or (0,))
    past = rows.past - pads
    total = rows.total - pads
    same = total <= limit or past <= 0 or (kind == "longrope" and past > limit)
    if same:
        return None
    if rows.new > 1:
        raise UnsupportedModeError(
            f"rope_type '{kind}': beyond {limit} tokens this model turns keys by angles that depend on the length of "
            f"the text. The cache holds {past} tokens, and this forward goes on to {total}: the answer would not be "
            "that of the whole text. Read the text in one forward (without prefill_chunk_size, a filled cache or "
            "drafts), or keep it within that length."
        )
    return (
        f"rope_type {kind}: decoding went beyond {limit} tokens, where new keys are turned by other angles than the "
        "cached ones (in Transformers as well)"
    )


def rotations(base: PreTrainedModel, layers: Iterable[int]) -> dict[int, Rotation]:
    """How these layers turn their queries and keys, by layer; empty for a model without numbers (``meta``).

    One token is read at two positions. Alone it attends to itself, so a layer gets the same numbers both times, and its
    cached keys differ by their rotation. That of each layer is the one among the frequencies the model holds, or none
    (NoPE), that makes one key of the other. A factor on cosine and sine (yarn) is in both, and no part of the rotation.

    Args:
        base: the base model that reads the text, not patched.

    Raises:
        UnsupportedModeError: angles depend on the length of the text or on images; or the keys of a layer are not
            turned by halves, channel i with channel i + R / 2.
    """
    if (why := _uneven(base.config)) is not None:
        raise _no_rotation(why)
    held = [x for name, x in base.named_buffers() if name.endswith("inv_freq") and "original" not in name]
    if any(x.is_meta for x in base.parameters()) or any(x.is_meta for x in held):
        return {}
    known = [Rotation(()), *(Rotation(tuple(x.double().tolist())) for x in held)]
    with torch.no_grad(), _as_evaluated(base):
        here, ahead = (_keys(base, position) for position in (0, AHEAD))
    found = {}
    for layer in layers:
        before, after = here.layers[layer].keys.double(), ahead.layers[layer].keys.double()
        misses = [_length(one.turn(before, torch.tensor([AHEAD])) - after) for one in known]
        best = min(range(len(known)), key=misses.__getitem__)
        if misses[best] > FITS * _length(after):
            kind = base.config.model_type
            raise _no_rotation(f"layer {layer} of this {kind} does not turn its keys by halves")
        found[layer] = known[best]
    return found


def _uneven(config: Any) -> str | None:
    """Why the angles of a model are not a number for each position."""
    if (limited := length_limit(config)) is not None:
        return f"rope_type '{limited[0]}' turns keys by angles that depend on the length of the text"
    rope = getattr(config, "rope_parameters", None) or {}
    if "mrope_section" in rope:
        return f"the positions of this {config.model_type} depend on the images of a prompt"
    return None


def _no_rotation(why: str) -> UnsupportedModeError:
    free = ", ".join(word for word in words("eviction") if not load("eviction", word).rotates)
    return UnsupportedModeError(f"the score needs un-rotated queries, and {why}. Scores that need none: {free}.")


def _keys(base: PreTrainedModel, position: int) -> DynamicCache:
    """The cached keys of one token that is read at a position."""
    device = base.get_input_embeddings().weight.device
    ids, positions = (torch.tensor([[number]], device=device) for number in (TOKEN, position))
    cache = DynamicCache(config=base.config)
    base(input_ids=ids, position_ids=positions, use_cache=True, **{CACHE: cache})
    return cache


def _length(x: Tensor) -> float:
    return x.norm().item()


@contextmanager
def _as_evaluated(base: nn.Module) -> Iterator[None]:
    """Without dropout inside."""
    training = [module for module in base.modules() if module.training]
    base.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
