"""Where kernel cpu was measured to be faster than native: the rows of ``native_speed.json``, by kind of machine.

A row says how many times faster native was (``faster``, the least over the lengths measured) for one ``function`` of
`FUNCTIONS`, ``dtype`` and ``head_dim``, on machines of one ``arch``. ``hf-longctx bench kernels --rows`` writes them.
"""

from __future__ import annotations

import json
from ctypes import CDLL
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..layout.blocks import BlockList
from ..layout.reads import All, Causal, Window

if TYPE_CHECKING:
    from .base import Case

FILE = Path(__file__).with_name("native_speed.json")
ARCHS = ("avx512-bf16", "avx512", "avx2")  # of the library; "+amx" behind it where torch has the tiles of AMX
AMX = "+amx"
DENSE, WINDOW, BLOCKS, FEW, DECODE = FUNCTIONS = ("dense", "window", "blocks", "few", "decode")

Table = dict[tuple[str, str, str], dict[int, float]]  # (arch, function, dtype) -> head_dim -> times faster


def arch_of(library: CDLL) -> str:
    """The instructions that the library was compiled for, and whether torch multiplies bfloat16 by AMX."""
    return library.hf_longctx_arch().decode() + AMX * _torch_has_amx()


def function_of(case: Case) -> str | None:
    """The function that computes a case; None for what was not measured: scores with extras, packed segments."""
    if case.kinds or case.softcap or case.first_bias:
        return None
    if case.one_query:
        return DECODE if case.reads in (All, Causal) else None
    if case.few:
        return FEW if case.reads is Causal else None
    return {Causal: DENSE, Window: WINDOW, BlockList: BLOCKS}.get(case.reads)


def dtype_word(dtype: torch.dtype) -> str:
    """As the rows have it: float32, bfloat16."""
    return str(dtype).removeprefix("torch.")


def faster(arch: str, case: Case) -> float | None:
    """How many times faster native was than cpu, in the row of the nearest head_dim; None where none was measured."""
    rows = table().get((arch, function_of(case), dtype_word(case.dtype)))
    return rows and rows[min(rows, key=lambda dim: (abs(dim - case.head_dim), dim))]


@cache
def table() -> Table:
    """The rows of the package."""
    found: Table = {}
    for row in read(FILE):
        found.setdefault((row["arch"], row["function"], row["dtype"]), {})[row["head_dim"]] = row["faster"]
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    return json.loads(path.read_text("utf-8"))["rows"]


@cache
def _torch_has_amx() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
