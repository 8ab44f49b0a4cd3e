"""The command ``hf-longctx bench memory``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..config.words import check_word
from ..io.console import console, tables
from ..planning.sizes import DTYPES, parse_bytes, parse_tokens
from . import _outputs as outputs
from ._outputs import Json, Png

if TYPE_CHECKING:
    from ..planning.memory import Subject

Model = Annotated[str, typer.Argument(help="Shipped config, one of its hub ids, YAML, local folder, or hub id.")]
Memory = Annotated[str, typer.Option(help="In all, e.g. 24GB (10^9 bytes each) or 24GiB.")]
Dtype = Annotated[str, typer.Option(help="fp32 or bf16 (fp16 takes as much).")]
Batch = Annotated[int, typer.Option(help="Rows of that length.", min=1)]
CHUNK = "Tokens of the prompt per forward (4096 or 4k; k: 1024); 0 for all."
Chunk = Annotated[str, typer.Option("--prefill-chunk-size", "--chunk", help=CHUNK)]
Weights = Annotated[str | None, typer.Option(help="Size of the weights, e.g. 5.7GB of quantised ones.")]
Config = Annotated[str | None, typer.Option(help="What to patch a folder or hub id with.", show_default="auto")]
Check = Annotated[bool, typer.Option("--check", help="Also allocate the KV caches and count their bytes.")]
CheckTokens = Annotated[str | None, typer.Option(help="Check so many tokens (8192 or 8k), not the longest context.")]


def command(
    model: Model,
    memory: Memory,
    dtype: Dtype = "bf16",
    batch: Batch = 1,
    chunk: Chunk = "4096",
    weights: Weights = None,
    config: Config = None,
    check: Check = False,
    check_tokens: CheckTokens = None,
    json: Json = None,
    png: Png = None,
) -> None:
    """The longest context that fits into so much memory, dense and patched: calculated, and checked by allocating."""
    check_word(dtype, DTYPES, "--dtype")
    outputs.check(json, png)
    size = None if weights is None else parse_bytes(weights, "--weights")
    from ..bench.show import as_json
    from ..planning.find import find
    from ..planning.memory import MemorySettings

    per_forward = parse_tokens(chunk, "--prefill-chunk-size", 0)
    tokens = None if check_tokens is None else parse_tokens(check_tokens, "--check-tokens")
    settings = MemorySettings(parse_bytes(memory, "--memory"), dtype, batch, per_forward, size)
    subject = find(model, settings, config)
    results = measure(subject, check or tokens is not None, tokens)
    outputs.write(json, png, {**as_json("memory", settings, results), "model": model, "notes": list(subject.notes)})
    show(console(), subject, results)


def measure(subject: Subject, check: bool, check_tokens: int | None) -> list[dict[str, Any]]:
    """For every way the longest context, its need, and where asked for, the bytes that were really allocated.

    Raises:
        LongCtxError: as ``memory_check.check``.
    """
    from ..bench import memory_check
    from ..planning.memory import WAYS, longest

    results = []
    for way in WAYS:
        tokens = longest(subject, way)
        result = {"way": way, "longest": tokens, "need": None, "checked": None}
        if tokens:
            result["need"] = subject.need(way, tokens).as_dict()
        count = check_tokens if check_tokens is not None else tokens
        if check and count:
            result["checked"] = {"tokens": count, "bytes": memory_check.check(subject, way, count)}
        results.append(result)
    return results


def show(console: Console, subject: Subject, results: list[dict[str, Any]]) -> None:
    """The table, how it was counted, and what is not known."""
    s = subject.settings
    title = f"bench memory: longest context in {s.memory / 1e9:.2f} GB, {subject.name}"
    names = ["", "tokens", "of dense", "weights GB", "KV GB", "working GB"]
    names += ["KV allocated"] * any(result["checked"] is not None for result in results)
    rows = [_line(result, results[0]["longest"])[: len(names)] for result in results]
    for table in tables(title, names, rows, console.width):
        console.print(table)
    roles = "".join(plan.letters for plan in subject.plans)
    rows = f"{s.batch} row{'s' if s.batch > 1 else ''}"
    read = f"read in chunks of {s.chunk} tokens (prefill_chunk_size={s.chunk})" if s.chunk else "read in one forward"
    lines = [
        f"{s.dtype}, {rows} of prompt and answer together, the prompt {read}; patched, {roles.count('R')} of "
        f"{len(roles)} KV heads keep every token. GB are 10^9 bytes.",
        "patched: as generate() makes the cache, with the spare room of growing buffers. patched, max_tokens: "
        "LongCtxCache(model, max_tokens=...), which never grows. working: what a prefill needs beside weights and KV; "
        "a calculation (docs/benchmarks.md has the rule), attention kernels for GPUs may need more.",
        *subject.notes,
    ]
    from ..planning.memory import UNKNOWN_LENGTH

    said = UNKNOWN_LENGTH if subject.made_for is None else f"the model was made for {subject.made_for} tokens"
    lines += [f"{one[0].upper()}{one[1:]}." for one in (said, subject.config.heads.doubt) if one is not None]
    if any(result["longest"] == 0 for result in results):
        lines.append(f"The weights alone take {subject.weights / 1e9:.2f} GB.")
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _line(result: dict[str, Any], dense: int | None) -> list[str]:
    tokens, need, checked = result["longest"], result["need"], result["checked"]
    line = [result["way"], "no limit" if tokens is None else f"{tokens}" if tokens else "none"]
    line.append(f"{tokens / dense:.2f}x" if tokens and dense else "")
    line += [f"{need[part] / 1e9:.2f}" if need else "" for part in ("weights", "kv", "working")]
    said = "" if checked is None else f"{checked['bytes'] / 1e9:.3f} GB at {checked['tokens']}, as calculated"
    return [*line, said]
