"""The commands ``hf-longctx bench decode | prefill | e2e | memory``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .environment import Busy, retune
from .memory_commands import command as memory
from .settings import Settings

app = typer.Typer(no_args_is_help=True, help="Speed and memory, stock against patched, on this machine.")
app.command("memory")(memory)

Dtypes = Annotated[str, typer.Option("--dtype", help="fp32, bf16, or both.")]
Layers = Annotated[int, typer.Option(help="Layers. The default shape is that of Llama-3.2-1B.")]
Heads = Annotated[int, typer.Option(help="Query heads.")]
KVHeads = Annotated[int, typer.Option(help="KV heads; half of them are streaming in the last column.")]
HeadDim = Annotated[int, typer.Option(help="Dimension of a head.")]
Sink = Annotated[int, typer.Option(help="First tokens that streaming heads keep.")]
Recent = Annotated[int, typer.Option(help="Latest tokens that streaming heads keep.")]
Rounds = Annotated[int, typer.Option(help="How often every column takes its turn.")]
Threads = Annotated[int | None, typer.Option(help="Threads of torch; default: torch's own choice.")]
Seed = Annotated[int, typer.Option(help="Of the random tensors, and of which heads are streaming.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write versions, settings and every raw time here.")]
Malloc = Annotated[
    bool, typer.Option("--tuned-malloc", help="Run again with malloc variables that help stock's torch.cat.")
]


@app.command()
def decode(
    tokens: Annotated[str, typer.Option(help="Lengths of the filled caches.")] = "8192,32768",
    dtype: Dtypes = "fp32,bf16",
    layers: Layers = 4,
    heads: Heads = 32,
    kv_heads: KVHeads = 8,
    head_dim: HeadDim = 64,
    sink: Sink = 64,
    recent: Recent = 256,
    rounds: Rounds = 7,
    steps: Annotated[int, typer.Option(help="Tokens decoded per column and round.")] = 3,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = None,
    tuned_malloc: Malloc = False,
) -> None:
    """Attention and cache update of one decoded token, per layer, over caches filled with random K/V."""
    _bench("decode", locals())


@app.command()
def prefill(
    tokens: Annotated[str, typer.Option(help="Lengths of the prompt.")] = "8192,32768",
    dtype: Dtypes = "fp32,bf16",
    layers: Layers = 4,
    heads: Heads = 32,
    kv_heads: KVHeads = 8,
    head_dim: HeadDim = 64,
    sink: Sink = 64,
    recent: Recent = 256,
    densities: Annotated[str, typer.Option(help="Percents of the blocks that block lists read.")] = "10,20,30",
    rounds: Rounds = 3,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = None,
    tuned_malloc: Malloc = False,
) -> None:
    """Attention over a prompt, of streaming heads and by block lists, against dense attention. Takes minutes."""
    _bench("prefill", locals())


@app.command()
def e2e(
    tokens: Annotated[str, typer.Option(help="Lengths of the prompt.")] = "512,1024",
    dtype: Dtypes = "fp32,bf16",
    layers: Layers = 4,
    heads: Heads = 32,
    kv_heads: KVHeads = 8,
    head_dim: HeadDim = 64,
    sink: Sink = 64,
    recent: Recent = 256,
    rounds: Rounds = 5,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = None,
    tuned_malloc: Malloc = False,
) -> None:
    """A whole model of random weights: prompt to logits and one decoded token, stock against patched."""
    _bench("e2e", locals())


def _bench(benchmark: str, given: dict[str, Any]) -> None:
    """Run one benchmark, print its table and goals, and write the JSON."""
    path, tuned = given.pop("json"), given.pop("tuned_malloc")
    words = tuple(word.strip() for word in given.pop("dtype").split(",") if word.strip())
    if "densities" in given:
        given["densities"] = _numbers(given["densities"], "--densities", "percents such as 10,20,30")
    lengths = _numbers(given.pop("tokens"), "--tokens", "lengths such as 8192,32768")
    settings = Settings(lengths, words, **given)
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"{path.parent} is not a folder", param_hint="--json")
    if tuned:
        retune()
    import torch  # here, so that --help does not wait for it

    from .show import as_json, save, show

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    busy = Busy()
    with Console(stderr=True).status(f"bench {benchmark}: {settings.rounds} rounds, which takes minutes at full size"):
        results = importlib.import_module(f"{__package__}.{benchmark}").run(settings)
    data = as_json(benchmark, settings, results, busy.others())
    show(Console(), data)
    if path is not None:
        save(path, data)


def _numbers(text: str, option: str, example: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of {example}", param_hint=option) from None
