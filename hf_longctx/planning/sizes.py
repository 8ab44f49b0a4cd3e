"""Sizes as people write them: ``24GB`` of memory, ``bf16`` numbers."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

from ..config.bounds import MOST
from ..config.words import check_word, short
from ..errors import ConfigError

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # word of the command line -> name in torch
TOKEN_UNITS = {"": 1, "k": 2**10, "m": 2**20}
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


def parse_tokens(text: str | int, where: str, least: int = 1) -> int:
    """Tokens of ``131072`` or ``128k``: k is 1024 and M is 1024 times that, as in the names of models.

    Raises:
        ConfigError: ``where`` is no such number, or less than ``least``.
    """
    found = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,6})?)\s*([kKmM]?)\s*", str(text).replace("_", ""))
    count = None if found is None else Fraction(found[1]) * TOKEN_UNITS[found[2].lower()]
    if count is None or count != int(count) or not least <= count <= MOST:
        raise ConfigError(
            f"{where}: got {short(text)}, expected a whole number of tokens such as 131072 or 128k (k is 1024, M is "
            f"1048576), from {least} to {MOST}."
        )
    return int(count)


def parse_bytes(text: str | int, where: str) -> int:
    """Bytes of a size with its unit, or of a plain number of bytes.

    Raises:
        ConfigError: ``where`` is no such size.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    form = r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]+)\s*"
    found = re.fullmatch(form, text) if isinstance(text, str) else None
    units = {name.lower(): factor for name, factor in UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise ConfigError(f"{where}: {short(text)} is no size such as 24GB; units: {', '.join(UNITS)}.")
    return round(Fraction(found[1]) * units[found[2].lower()])
