"""What a cache's file has of selections: the indexes that cannot be made of the keys alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.bounds import MOST
from ..config.words import spec_word
from ..decode._selection import ALL, Part, Selection
from ..decode.base import SelectSpec
from ..layout.rows import Rows
from ..stores._saved import SavedTensors, Told, short

NAME = "selections"  # of a layer's plain data, and in the names of its tensors
ROW = "row"
TENSORS = "tensors"


def facts(spec: SelectSpec) -> dict[str, Any]:
    """On what depends what a file has of its indexes, as plain data; empty where it has nothing."""
    return {"select": spec_word(spec), **{name: getattr(spec, name) for name in spec.saved}} if spec.saved else {}


def saved(selection: Selection) -> tuple[dict[str, Tensor], list[dict[str, int]]]:
    """What `restore` needs: tensors by name, and plain data that JSON can hold."""
    tensors = {}
    plain = []
    for row, part in sorted(selection.parts.items()):
        kept = part.index.saved()
        tensors |= {f"{row}.{name}": tensor for name, tensor in kept.items()}
        numbers = {name: getattr(part.index, name) for name in part.index.numbers}
        plain.append({ROW: row, TENSORS: list(kept), **numbers})
    return tensors, plain


def check(
    selection: Selection,
    told: Told,
    tensors: SavedTensors,
    prefix: str,
    rows: Rows,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    """Raise CacheError unless `restore` can take what is told, and the tensors whose names begin with ``prefix``.

    Args:
        rows: all that was seen.
        heads: n, H, D.
    """
    known = set()
    for one in told.items():
        index = selection.spec.new_index()
        parts = one.fields(ROW, TENSORS, *index.numbers)
        row = parts[ROW].number(ALL, rows.batch - 1)
        if row in known or ALL in known or (row == ALL and (known or rows.padded)):
            parts[ROW].refuse(f"got {row}, expected each row once, or {ALL} for all of them")
        known.add(row)
        numbers = {name: parts[name].number(0, MOST) for name in index.numbers}
        tokens = rows.total - rows.start(max(0, row))
        try:
            expected = index.expected(numbers, tokens, (rows.batch if row == ALL else 1, *heads), dtype)
            if [name.value for name in parts[TENSORS].items()] != list(expected):
                parts[TENSORS].refuse(f"got {short(parts[TENSORS].value)}, expected {short(list(expected))}")
            for name, (kind, size) in expected.items():
                tensors.check(f"{prefix}{row}.{name}", kind, *size)
            index.restore(numbers, {name: tensors.read(f"{prefix}{row}.{name}") for name in expected})
        except ValueError as error:
            one.refuse(str(error))


def restore(
    selection: Selection, read: Callable[[str], Tensor], plain: Sequence[Mapping[str, Any]], device: torch.device
) -> None:
    """Fill this empty selection with what `saved` gave, each tensor as ``read(name)`` gives it, onto ``device``."""
    for one in plain:
        part = Part(selection.spec.new_index())
        row = one[ROW]
        with torch.inference_mode(False):  # so that the cache can be continued outside of inference mode
            tensors = {name: read(f"{row}.{name}").to(device, copy=True) for name in one[TENSORS]}
        part.index.restore(one, tensors)
        selection.parts[row] = part
