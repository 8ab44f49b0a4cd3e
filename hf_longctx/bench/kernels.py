"""``bench kernels``: kernel native against kernel cpu (torch), by function, dtype and head_dim, for ``auto``."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import groupby, product
from pathlib import Path
from types import ModuleType

import torch

from ..errors import ConfigError, UnsupportedModeError
from ..io.environment import environment
from ..kernels import cpu, native
from ..kernels._native_speed import BLOCKS, DECODE, FEW, FUNCTIONS, WINDOW, dtype_word, read
from ..kernels.base import case_of as call_of
from ..layout.reads import ALL, CAUSAL, Reads, Window
from ..layout.scores import Scores
from ..layout.segments import Segment
from .block_lists import random_list
from .columns import check_same, dtype_of, random_heads
from .measure import Samples, Told, paired_ratio, quiet, turns
from .settings import Settings

NATIVE = "native"
TORCH = "torch"
KERNELS = {TORCH: cpu, NATIVE: native}
FEW_QUERIES = 16  # of the function few
SHORTEST = 0.02  # seconds of one sample: quicker calls are repeated
BUFFERS = 8  # caches that are decoded over in turn, so that none is found in the processor's cache
DENSITY = 20  # percent of the causal blocks of the block lists
SAID = ("dtypes", "tokens", "layers", "heads", "kv_heads", "sink", "recent", "rounds", "seed", "densities")

Call = tuple[torch.Tensor, list[Segment], Reads]  # queries, and what they read


@dataclass(frozen=True)
class KernelsCase:
    """What is measured.

    Attributes:
        settings: the heads, but for their dimension, and how to measure.
        head_dims: the dimensions, one after the other.
    """

    settings: Settings
    head_dims: tuple[int, ...]

    @property
    def cases(self) -> list[tuple[str, int, int]]:
        """(function, head_dim, tokens) of every case of a dtype."""
        return list(product(FUNCTIONS, self.head_dims, self.settings.tokens))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every case of a dtype."""
        return tuple(tokens for _, _, tokens in self.cases)


def case_of(settings: Settings, head_dim: tuple[int, ...] = (64, 128)) -> KernelsCase:
    """What to measure.

    Raises:
        ConfigError: a dimension that native does not take, or prompts that no window fits into.
        UnsupportedModeError: native does not run here.
    """
    if not head_dim or min(head_dim) < 1:
        raise ConfigError(f"head_dim must be numbers of at least 1, given {list(head_dim)}.")
    least = max(settings.sink, FEW_QUERIES)
    if min(settings.tokens) <= least:
        raise ConfigError(f"tokens must be more than {least} here, sink among them, given {min(settings.tokens)}.")
    settings = replace(settings, layers=1, densities=(DENSITY,), patterns=())
    for dim, word in product(head_dim, settings.dtypes):
        case = call_of(torch.empty(1, 1, 1, dim, dtype=dtype_of(word)), (), ALL, Scores(1.0))
        if (reason := native.supports(case)) is not None:
            raise UnsupportedModeError(f"bench kernels measures kernel native, which {reason}.")
    return KernelsCase(settings, head_dim)


@torch.no_grad()
def run(case: KernelsCase, told: Told = quiet) -> list[dict]:
    """One result per dtype, function, head_dim and length; ``columns`` holds every raw time.

    Raises:
        LongCtxError: the kernels do not compute the same.
    """
    return [
        _measured(replace(case.settings, head_dim=dim), word, function, tokens, told)
        for word in case.settings.dtypes
        for function, dim, tokens in case.cases
    ]


def facts(case: KernelsCase, results: list[dict]) -> dict:
    """What the JSON holds besides every time: the kind of machine, the rows for ``auto``, the settings of a part."""
    settings = asdict(case.settings)
    said = {name: settings[name] for name in SAID} | {"head_dim": case.head_dims, "kernel": f"{NATIVE}, {cpu.NAME}"}
    machine = {"arch": native.arch(), "torch_cpu": torch.backends.cpu.get_cpu_capability()}
    return {**machine, "settings": said, "rows": list(_rows(case.settings, results))}


def rows_of(path: Path | None) -> list[dict]:
    """The rows that a file has; none without one.

    Raises:
        ConfigError: it has no rows.
    """
    if path is None or not path.exists():
        return []
    try:
        return sorted(read(path), key=_key)
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} has no rows of bench kernels. Name such a file, or one that is not there.") from None


def write_rows(path: Path | None, rows: list[dict], others: list[dict]) -> None:
    """Write ``rows``, and ``others`` but for those that are measured anew; nothing without a path."""
    if path is not None:
        both = sorted({_key(row): row for row in (*others, *rows)}.values(), key=_key)
        path.write_text('{"rows": [\n' + ",\n".join(map(json.dumps, both)) + "\n]}\n", "utf-8")


def _key(row: dict) -> tuple:
    return row["arch"], FUNCTIONS.index(row["function"]), row["dtype"], row["head_dim"]


def _rows(settings: Settings, results: list[dict]) -> Iterator[dict]:
    """A row per function, dtype and head_dim, as ``kernels/native_speed.json`` has them."""
    e = environment()
    measured = {name: e[name] for name in ("cpu", "threads", "torch", "hf_longctx")}
    measured |= {"torch_cpu": torch.backends.cpu.get_cpu_capability(), "date": date.today().isoformat()}
    measured |= {"heads": settings.heads, "kv_heads": settings.kv_heads, "rounds": settings.rounds}
    for (word, function, dim), group in groupby(results, lambda r: (r["dtype"], r["function"], r["head_dim"])):
        ratios = {str(result["tokens"]): round(result["faster"], 3) for result in group}
        where = {"arch": native.arch(), "function": function, "dtype": dtype_word(dtype_of(word)), "head_dim": dim}
        yield {**where, "faster": min(ratios.values()), "by_tokens": ratios, "measured": measured}


def _measured(settings: Settings, word: str, function: str, tokens: int, told: Told) -> dict:
    """The two kernels, compared, and then timed in turns."""
    torch.manual_seed(settings.seed)
    calls = _calls(settings, word, function, tokens)
    works = {name: _work(kernel, calls, settings.head_dim**-0.5) for name, kernel in KERNELS.items()}
    outs = {name: work() for name, work in works.items()}
    error = check_same(f"{function} over {tokens} tokens by kernel native", outs[NATIVE], outs[TORCH], word)
    repeats = {name: _repeats(work) for name, work in works.items()}
    times = {name: Samples() for name in works}
    for _, name in turns(works, settings.rounds, tokens, told):
        times[name].time(
            lambda: [works[name]() for _ in range(repeats[name])],  # noqa: B023
            repeats[name] * len(calls),
        )
    faster = paired_ratio(times[TORCH], times[NATIVE])
    columns = {name: {"kernel": KERNELS[name].NAME, "ms": times[name].as_dict()} for name in works}
    columns[NATIVE]["ms_ratio"] = 1 / faster
    where = {"dtype": word, "tokens": tokens, "function": function, "head_dim": settings.head_dim}
    return {**where, "error": error, "faster": faster, "columns": columns}


def _calls(settings: Settings, word: str, function: str, tokens: int) -> list[Call]:
    """What one timing computes: queries as a projection gives them, keys and values as a store keeps them."""
    dtype = dtype_of(word)
    queries = {DECODE: 1, FEW: FEW_QUERIES}.get(function, tokens)
    q = random_heads(settings.heads, queries, settings, dtype)
    k, v = (random_heads(settings.kv_heads, tokens, settings, dtype).contiguous() for _ in "kv")
    if function == DECODE:
        return [(q, [Segment(k.clone(), v.clone(), tokens)], ALL) for _ in range(BUFFERS)]
    if function == WINDOW:
        sink = settings.sink
        parts = [Segment(k[:, :, part], v[:, :, part], size) for part, size in _split(sink, tokens)]
        return [(q, parts, Window(settings.recent, sink))]
    whole = [Segment(k, v, tokens)]
    if function == BLOCKS:
        return [(q, whole, random_list(tokens, settings.heads, DENSITY / 100, settings.seed))]
    return [(q, whole, CAUSAL)]


def _split(sink: int, tokens: int) -> list[tuple[slice, int]]:
    return [(slice(sink), sink), (slice(sink, None), tokens - sink)]


def _work(kernel: ModuleType, calls: list[Call], scale: float) -> Callable[[], torch.Tensor]:
    """All calls, of which the last one's output is given."""
    scores = Scores(scale)
    return lambda: [kernel.attend(*call, scores, False)[0] for call in calls][-1]


def _repeats(work: Callable[[], object]) -> int:
    """How often to repeat the work in one sample."""
    start = time.perf_counter()
    work()
    return max(1, math.ceil(SHORTEST / (time.perf_counter() - start)))
