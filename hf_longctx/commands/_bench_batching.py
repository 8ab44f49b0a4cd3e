"""The command ``hf-longctx bench batching``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

from ..assets import embedded
from ..io.console import console, count, tables
from ..io.progress import Progress
from ..planning.sizes import DTYPES, parse_tokens
from ._bench_options import Dtypes, Rounds
from ._options import JSON, Json, Model, Recent, Sink, check_output, device_of, load_model, write_json

Tokens = Annotated[str, typer.Option(help="Of the longest prompt: 512,8k (k: 1024); the shortest has half.")]
Config = Annotated[
    str | None,
    typer.Option(
        help="What to patch with: auto, a shipped name, a .yaml.", show_default="half of each layer's heads stream"
    ),
]


def command(
    model: Model,
    tokens: Tokens = "512,2048",
    requests: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 8,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=1)] = 32,
    dtype: Dtypes = "fp32",
    config: Config = None,
    sink: Sink = 64,
    recent: Recent = 256,
    page: Annotated[int, typer.Option(help="Tokens of a page.", min=4)] = 256,
    batch_tokens: Annotated[int, typer.Option(help="Most tokens of a step.", min=1)] = 2048,
    rounds: Rounds = 3,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.", show_default="torch's own choice")] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the prompts, and of which heads are streaming.")] = 0,
    json: Json = None,
) -> None:
    """Many requests by continuous batching and as one padded batch, stock against patched."""
    check_output(json, JSON, "--json")
    import torch

    from ..bench.batching import BatchingCase, run
    from ..bench.environment import Busy, environment

    lengths = tuple(parse_tokens(part, "--tokens") for part in tokens.split(","))
    words = tuple(word.strip() for word in dtype.split(","))
    sizes = {"page": page, "batch_tokens": batch_tokens, "sink": sink, "recent": recent}
    case = BatchingCase(lengths, requests, new_tokens, words, config=config, rounds=rounds, seed=seed, **sizes)
    if threads is not None:
        torch.set_num_threads(threads)

    def load(word: str) -> tuple[Any, Any]:
        return load_model(embedded(model), DTYPES[word], device_of(None), needs_tokenizer=False)

    busy = Busy()
    each = len(words) * rounds
    with Progress("bench batching", each * len(lengths), "rounds", weight=each * sum(lengths)) as bar:
        results = run(case, load, bar.advance)
    data = {"benchmark": "batching", "environment": {**environment(), "others": busy.others()}, "model": model}
    data |= {"settings": {**asdict(case), "threads": torch.get_num_threads()}, "results": results}
    write_json(json, data)
    show(console(), data)


def show(to: Console, data: dict[str, Any]) -> None:
    """The table, and what it ran on."""
    from ..bench.show import show_busy

    names = ["", "tokens/s", "vs stock continuous", "vs stock padded"]
    for table in tables("bench batching: answers of many requests", names, list(_rows(data["results"])), to.width):
        to.print(table)
    settings, e = data["settings"], data["environment"]
    lines = [
        f"{data['model']}, {count(settings['requests'], 'request')} with prompts of half to all of these tokens and "
        f"answers of {settings['new']}; pages of {settings['page']} tokens, steps of at most "
        f"{settings['batch_tokens']}. {count(settings['rounds'], 'round')}, columns in turns; medians, ratios of the "
        "same round. Prompts are read within the time.",
        *(_said(result) for result in data["results"]),
        f"torch {e['torch']}, transformers {e['transformers']}, hf_longctx {e['hf_longctx']}; {e['cpu']}, "
        f"{count(settings['threads'], 'thread')}.",
    ]
    for line in lines:
        to.print(line, markup=False, highlight=False)
    show_busy(to, e)


def _rows(results: list[dict[str, Any]]) -> Iterator[list[str] | None]:
    for number, result in enumerate(results):
        if number:
            yield None
        yield [f"[bold]{result['dtype']}, {result['tokens']} tokens[/]"]
        for name, figures in result["columns"].items():
            ratios = (figures["faster_than_continuous"], figures["faster_than_padded"])
            yield [name, f"{figures['tokens_per_s']:.1f}", *(f"{ratio:.2f}x" for ratio in ratios)]


def _said(result: dict[str, Any]) -> str:
    megabytes = [result[name] / 1e6 for name in ("bytes", "bytes_dense")]
    return (
        f"{result['dtype']}, {result['tokens']}: {result['retrieval_heads']} of {result['kv_heads']} KV heads keep "
        f"every token; pages of at most {megabytes[0]:.1f} MB (10^6 bytes), {megabytes[1]:.1f} MB if every head did; "
        f"{result['same']:.0%} of the tokens are those of generate() alone. Prompts: {result['prompts']}."
    )
