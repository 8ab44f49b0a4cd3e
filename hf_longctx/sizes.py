"""Sizes as people write them: ``24GB`` of memory, ``bf16`` numbers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .errors import ConfigError
from .registry import check_word

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # word of the command line -> name in torch
UNITS = {"GB": 10**9, "MB": 10**6, "TB": 10**12, "GiB": 2**30, "MiB": 2**20, "TiB": 2**40}


def dtype_of(word: str) -> torch.dtype:
    """The dtype a word of ``DTYPES`` names."""
    import torch  # here, because the commands take DTYPES from this file, and their --help needs no torch

    return getattr(torch, DTYPES[word])


def word_of(dtype: torch.dtype) -> str:
    """The word of ``DTYPES`` whose numbers take as many bytes.

    Raises:
        ConfigError: none does.
    """
    found = [word for word in DTYPES if dtype_of(word).itemsize == dtype.itemsize]
    check_word(found[0] if found else str(dtype), DTYPES, "dtype")
    return found[0]


def parse_bytes(text: str | int, where: str) -> int:
    """Bytes of a size with its unit, or of a plain number of bytes.

    Raises:
        ConfigError: ``where`` is no such size.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text) if isinstance(text, str) else None
    units = {name.lower(): factor for name, factor in UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise ConfigError(f"{where}: {text!r} is no size such as 24GB; units: {', '.join(UNITS)}.")
    return round(float(found[1]) * units[found[2].lower()])
