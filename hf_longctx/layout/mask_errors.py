"""Why a 2D attention mask cannot be taken: one message for each cause."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModeError
from .prompt_learning import virtual_tokens


@dataclass(frozen=True)
class Known:
    """What of a model tells one cause from another.

    Attributes:
        virtual: what puts virtual tokens before its inputs, in words, or None.
        pads: its pad tokens.
        cached: ids ``[B, past]`` of the tokens that the cache has seen, where they are known.
    """

    virtual: str | None = None
    pads: tuple[int, ...] = ()
    cached: Tensor | None = None

    @classmethod
    def by(cls, model: Any, config: Any, cache: Any) -> Known:
        """Of the module that was patched (None where it is not known), the config of its base model, and the cache."""
        configs = (config, getattr(model, "generation_config", None))
        pads = tuple(getattr(one, "pad_token_id", None) for one in configs)
        return cls(virtual_tokens(model), pads, getattr(cache, "ids", None))


def wrong_shape(mask: Tensor, batch: int, past: int, new: int, known: Known) -> UnsupportedModeError:
    """The error for a mask that is not ``[batch, past + new]``."""
    rows, columns = mask.shape
    said = f"attention_mask has shape {tuple(mask.shape)}, but this forward needs {(batch, past + new)}: "
    if rows != batch:
        why = f"the inputs have {batch} rows. Pass one row of the mask for each."
    elif columns == new:
        why = f"it covers the {new} new tokens and not the {past} cached ones. Pass the mask of the whole sequence."
    elif columns > past + new and known.virtual is not None:
        why = f"{known.virtual}, and they are not in the cache of this forward. Call generate() of the PEFT model."
    elif columns > past + new:
        why = (
            f"it has columns for more than the {past} cached and {new} new tokens. Pass the cache that holds the "
            "others, or cut the mask."
        )
    else:
        why = f"one column for each of the {past} cached and {new} new tokens. Pass the mask of the whole sequence."
    return UnsupportedModeError(said + why)


def holes(real: Tensor, ids: Tensor | None, row: int, known: Known) -> UnsupportedModeError:
    """The error for a mask ``[B, past + new]`` whose row ``row`` has masked tokens between real ones.

    Args:
        ids: the new tokens ``[B, T]``, where they were given.
    """
    places = real[row].nonzero().flatten().tolist()
    said = f"attention_mask has holes: row {row} has {len(places)} real tokens between columns {places[0]} and "
    said += f"{places[-1]}. "
    before = _before_pads(real)
    token = _one_token(real, ids, row)
    if token is None and before is None and ids is not None and known.cached is not None:
        token = _one_token(real, torch.cat([known.cached.to(ids), ids], 1), row)
    if known.virtual is not None:
        why = f"{known.virtual}, before its left pads too. Give one sequence at a time, or sequences of one length."
    elif token is not None and token in known.pads:
        why = (
            f"What is masked is each token {token}, the pad token, also between real tokens (without a mask generate() "
            "makes such a one). If it is part of the text, pass attention_mask=torch.ones_like(input_ids), with 0 for "
            "left pads only; if it is padding, put it on the left."
        )
    elif before is not None:
        why = (
            f"Every row begins with {before} real tokens, and its pads follow: something was put before a left-padded "
            "batch, as PEFT's prompt learning does with its virtual tokens. Give one sequence at a time, or sequences "
            "of one length."
        )
    else:
        why = "Real tokens must be consecutive: pad on the left for generation, on the right for training."
    return UnsupportedModeError(said + why)


def _one_token(real: Tensor, ids: Tensor | None, row: int) -> int | None:
    """The only token of ``ids``, the last ones, that is masked, wherever it stands, inside ``row`` too."""
    new = None if ids is None else real[:, real.shape[1] - ids.shape[1] :]
    if new is None or new.shape != ids.shape or not _inside(new[row].tolist()):
        return None
    token = ids[row][~new[row]][-1]
    return int(token) if bool(((ids != token) == new).all()) else None


def _before_pads(real: Tensor) -> int | None:
    """Real tokens before the pads of every row that has pads, where they are as many in each; None for one row."""
    rows = real.tolist()
    before = {row.index(False) for row in rows if False in row}
    return before.pop() if len(rows) > 1 and len(before) == 1 and all(row[0] for row in rows) else None


def _inside(row: list[bool]) -> bool:
    """Whether masked tokens stand between real ones."""
    return True in row and False in row[row.index(True) : len(row) - row[::-1].index(True)]
