"""The command ``hf-longctx bench memory``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..io.console import console, count, tables
from ..planning.sizes import parse_tokens
from ._options import (
    JSON,
    PNG,
    Batch,
    Json,
    Memory,
    PlannedChunk,
    PlannedConfig,
    PlannedDtype,
    PlannedModel,
    Png,
    Weights,
    check_output,
    check_picture,
    planned_settings,
    write_json,
    write_png,
)

if TYPE_CHECKING:
    from ..planning.memory import MemoryModel

Check = Annotated[bool, typer.Option("--check", help="Also allocate the KV caches and count their bytes.")]
CheckTokens = Annotated[str | None, typer.Option(help="Check so many tokens (8192 or 8k), not the longest context.")]


def command(
    model: PlannedModel,
    memory: Memory,
    dtype: PlannedDtype = "bf16",
    batch: Batch = 1,
    chunk: PlannedChunk = "4096",
    weights: Weights = None,
    config: PlannedConfig = None,
    check: Check = False,
    check_tokens: CheckTokens = None,
    json: Json = None,
    png: Png = None,
) -> None:
    """The longest context that fits into so much memory, dense and patched: calculated, and checked by allocating."""
    options = planned_settings(memory, dtype, batch, chunk, weights)
    check_output(json, JSON, "--json")
    check_picture(png, PNG, "--png")
    from ..bench.show import as_json
    from ..planning.find import find
    from ..planning.memory import MemorySettings

    tokens = None if check_tokens is None else parse_tokens(check_tokens, "--check-tokens")
    settings = MemorySettings(**options)
    memory_model = find(model, settings, config)
    results = measure(memory_model, check or tokens is not None, tokens)
    data = {**as_json("memory", settings, results), "model": model, "notes": list(memory_model.notes)}
    write_json(json, data)
    write_png(png, data)
    show(console(), memory_model, results)


def measure(memory_model: MemoryModel, check: bool, check_tokens: int | None) -> list[dict[str, Any]]:
    """For every way the longest context, its need, and where asked for, the bytes that were really allocated.

    Raises:
        LongCtxError: as ``memory_check.check``.
    """
    from ..bench import memory_check
    from ..planning.memory import WAYS, longest

    results = []
    for way in WAYS:
        tokens = longest(memory_model, way)
        result = {"way": way, "longest": tokens, "need": None, "checked": None}
        if tokens:
            result["need"] = memory_model.need(way, tokens).as_dict()
        checked = check_tokens if check_tokens is not None else tokens
        if check and checked:
            counted = memory_check.check(memory_model, way, checked)
            left = {"bytes_left": counted.left} if memory_model.evicts and counted.left is not None else {}
            result["checked"] = {"tokens": checked, "bytes": counted.most, **left}
        results.append(result)
    return results


def show(console: Console, memory_model: MemoryModel, results: list[dict[str, Any]]) -> None:
    """The table, how it was counted, and what is not known."""
    s = memory_model.settings
    title = f"bench memory: longest context in {s.memory / 1e9:.2f} GB, {memory_model.name}"
    names = ["", "tokens", "of dense", "weights GB", "KV GB", "working GB"]
    names += ["KV allocated"] * any(result["checked"] is not None for result in results)
    rows = [_line(result, results[0]["longest"])[: len(names)] for result in results]
    for table in tables(title, names, rows, console.width):
        console.print(table)
    sequences = count(s.batch, "sequence")
    read = f"read in chunks of {s.chunk} tokens (prefill_chunk_size={s.chunk})" if s.chunk else "read in one forward"
    roles = "".join(plan.letters for plan in memory_model.plans)
    lines = [
        f"{s.dtype}, {sequences} of prompt and answer together, the prompt {read}; patched, {roles.count('R')} of "
        f"{len(roles)} KV heads {memory_model.config.kept}. GB are 10^9 bytes.",
        "patched: as generate() makes the cache, with the spare room of growing buffers. patched, max_tokens: "
        "LongCtxCache(model, max_tokens=...), which never grows. working: what a prefill needs beside weights and KV; "
        "a calculation (docs/benchmarks.md has the rule), attention kernels for GPUs may need more.",
        *memory_model.notes,
    ]
    lines += _evicted(memory_model, results)
    from ..planning.decoded import decoded
    from ..planning.memory import PATCHED, UNKNOWN_LENGTH, WAYS

    context = results[WAYS.index(PATCHED)]["longest"]
    if context and (reads := decoded(memory_model.plans, context)) is not None:
        lines.append(f"decode.retrieval: {reads}. Its index is in KV.")
    made_for = (
        UNKNOWN_LENGTH if memory_model.made_for is None else f"the model was made for {memory_model.made_for} tokens"
    )
    lines += [f"{one[0].upper()}{one[1:]}." for one in (made_for, memory_model.config.heads.doubt) if one is not None]
    if any(result["longest"] == 0 for result in results):
        lines.append(f"The weights alone take {memory_model.weights / 1e9:.2f} GB.")
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _evicted(memory_model: MemoryModel, results: list[dict[str, Any]]) -> list[str]:
    """What is left of the cache where tokens are evicted when the prompt has ended."""
    if not memory_model.evicts:
        return []
    left = [f"{one['way']} {one['need']['kv_left'] / 1e9:.2f} GB" for one in results[1:] if one["need"]]
    counted = [(one["way"], (one["checked"] or {}).get("bytes_left")) for one in results[1:]]
    checked = [f"{way} {count / 1e9:.3f} GB" for way, count in counted if count is not None]
    at_most = "" if memory_model.exact else " at most"
    lines = [f"KV is what the cache takes{at_most} while the prompt is read. {memory_model.ends}: {', '.join(left)}."]
    return lines + [f"Allocated then: {', '.join(checked)}, as calculated."] * bool(checked)


def _line(result: dict[str, Any], dense: int | None) -> list[str]:
    tokens = result["longest"]
    need = result["need"]
    checked = result["checked"]
    line = [result["way"], "no limit" if tokens is None else f"{tokens}" if tokens else "none"]
    line.append(f"{tokens / dense:.2f}x" if tokens and dense else "")
    line += [f"{need[part] / 1e9:.2f}" if need else "" for part in ("weights", "kv", "working")]
    allocated = "" if checked is None else f"{checked['bytes'] / 1e9:.3f} GB at {checked['tokens']}, as calculated"
    return [*line, allocated]
