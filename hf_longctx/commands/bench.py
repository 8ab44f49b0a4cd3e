"""The commands ``hf-longctx bench decode | prefill | e2e | crossover | memory | gpu``."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer

from ..bench.environment import Busy, retune
from ..bench.settings import Settings, default_layers
from ..io.console import console
from ..io.progress import Progress
from ..planning.sizes import parse_tokens
from . import _outputs as outputs
from ._outputs import Json, Png
from .bench_memory import command as memory

app = typer.Typer(no_args_is_help=True, help="Speed and memory, stock against patched, on this machine.")

Dtypes = Annotated[str, typer.Option("--dtype", help="fp32, bf16, or both.")]
Layers = Annotated[int, typer.Option(help="Layers. The default shape is that of Llama-3.2-1B.")]
Heads = Annotated[int, typer.Option(help="Query heads.")]
KVHeads = Annotated[int, typer.Option(help="KV heads; in half streaming, half of them stream.")]
HeadDim = Annotated[int, typer.Option(help="Dimension of a head.")]
Sink = Annotated[int, typer.Option(help="First tokens that streaming heads keep.")]
Recent = Annotated[int, typer.Option(help="Latest tokens that streaming heads keep.")]
Kernel = Annotated[str, typer.Option(help="Of the patched columns: auto, stock, cpu, native, ...")]
Rounds = Annotated[int, typer.Option(help="How often every column takes its turn.")]
Threads = Annotated[int | None, typer.Option(help="Threads of torch.", show_default="torch's own choice")]
Seed = Annotated[int, typer.Option(help="Of the random tensors, and of which heads are streaming.")]
Static = Annotated[bool, typer.Option("--static/--no-static", help="Also stock with Transformers' StaticCache.")]
Malloc = Annotated[
    bool, typer.Option("--tuned-malloc", help="Run again with malloc variables that help stock's torch.cat.")
]


@app.command()
def decode(
    tokens: Annotated[str, typer.Option(help="Lengths of the filled caches: 8192,32k (k: 1024).")] = "8192,32768",
    dtype: Dtypes = "fp32,bf16",
    layers: Layers = 4,
    heads: Heads = 32,
    kv_heads: KVHeads = 8,
    head_dim: HeadDim = 64,
    sink: Sink = 64,
    recent: Recent = 256,
    kernel: Kernel = "auto",
    rounds: Rounds = 7,
    steps: Annotated[int, typer.Option(help="Tokens decoded per column and round.")] = 3,
    static: Static = True,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = None,
    png: Png = None,
    tuned_malloc: Malloc = False,
) -> None:
    """Attention and cache update of one decoded token, per layer, over caches filled with random K/V."""
    _bench("decode", locals())


@app.command()
def prefill(
    tokens: Annotated[str, typer.Option(help="Lengths of the prompt: 8192,32k (k: 1024).")] = "8192,32768",
    dtype: Dtypes = "fp32,bf16",
    layers: Layers = 4,
    heads: Heads = 32,
    kv_heads: KVHeads = 8,
    head_dim: HeadDim = 64,
    sink: Sink = 64,
    recent: Recent = 256,
    kernel: Kernel = "auto",
    densities: Annotated[str, typer.Option(help="Percents of the blocks that block lists read.")] = "10,20,30",
    patterns: Annotated[
        str, typer.Option(help="Patterns whose choosing is timed, each WORD or WORD:field=value:field=value.")
    ] = "vertical_slash,block_topk",
    rounds: Rounds = 3,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = None,
    png: Png = None,
    tuned_malloc: Malloc = False,
) -> None:
    """Attention over a prompt, of streaming heads and by block lists, against dense attention; choosing the blocks."""
    _bench("prefill", locals())


@app.command()
def e2e(
    tokens: Annotated[str, typer.Option(help="Lengths of the prompt: 8192,32k (k: 1024).")] = "512,1024",
    dtype: Dtypes = "fp32,bf16",
    layers: Annotated[
        int | None, typer.Option(help="Layers.", show_default="4, or 8 with a prompt of 32768 tokens or more")
    ] = None,
    heads: Heads = 32,
    kv_heads: KVHeads = 8,
    head_dim: HeadDim = 64,
    sink: Sink = 64,
    recent: Recent = 256,
    kernel: Kernel = "auto",
    density: Annotated[
        int | None, typer.Option(help="One more column: half streaming, the other heads read this percent of blocks.")
    ] = None,
    static: Static = True,
    kvpress: Annotated[
        str | None,
        typer.Option(help="One more column: a press of kvpress, e.g. 'KnormPress(compression_ratio=0.5)'"),
    ] = None,
    rounds: Rounds = 5,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = None,
    png: Png = None,
    tuned_malloc: Malloc = False,
) -> None:
    """A whole model of random weights: prompt to logits and one decoded token, stock against patched."""
    _bench("e2e", locals())


@app.command()
def crossover(
    tokens: Annotated[
        str, typer.Option(help="Lengths of the prompt: 8192,32k (k: 1024).")
    ] = "512,1024,2048,4096,8192,16384,32768",
    dtype: Dtypes = "fp32",
    config: Annotated[
        str | None, typer.Option(help="Take shape, roles and patterns from this shipped config or .yaml.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="WORD or WORD:field=value:field=value.", show_default="the config's")
    ] = None,
    table: Annotated[str | None, typer.Option(help="One of the config's tables of patterns.")] = None,
    kernel: Annotated[str | None, typer.Option(help="auto, cpu, native, ...", show_default="the config's")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads, without --config.", show_default="32")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="KV heads, half of them measured.", show_default="8")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Dimension of a head.", show_default="64")] = None,
    rounds: Rounds = 5,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = None,
    png: Png = None,
    tuned_malloc: Malloc = False,
) -> None:
    """The prompt length from which sparse prefill wins on this machine, and the override that says so."""
    given = locals()
    what = {name: given.pop(name) for name in ("config", "pattern", "table", "kernel")}
    shape = [name for name in ("heads", "kv_heads", "head_dim") if given[name] is not None]
    if config is not None and shape:
        flag = f"--{shape[0].replace('_', '-')}"
        raise typer.BadParameter("the shape is the config's; give one or the other", param_hint=flag)
    _bench("crossover", given, what)


app.command("memory")(memory)


@app.command()
def gpu(
    tokens: Annotated[
        str, typer.Option(help="Lengths of the prompt: 8192,32k (k: 1024).")
    ] = "16384,32768,65536,131072",
    decode_tokens: Annotated[
        str, typer.Option(help="Lengths of the filled caches: 8192,32k (k: 1024).")
    ] = "32768,131072,524288,1048576",
    densities: Annotated[str, typer.Option(help="Percents of the blocks that block lists read.")] = "5,10,20",
    retrieval: Annotated[str, typer.Option(help="Percents of the KV heads that keep all, in decoding.")] = "25,50",
    kernels: Annotated[str, typer.Option(help="Kernels; the first is held to the goals.")] = "triton,flash,cpu",
    heads: Heads = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    head_dim: HeadDim = 128,
    sink: Sink = 64,
    recent: Recent = 256,
    rounds: Rounds = 10,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """The kernels on a CUDA GPU: prompts and decoding, of one layer, against the best dense attention there."""
    given = locals()
    outputs.check(given.pop("json"))
    given["tokens"] = _lengths(tokens, "--tokens")
    given["decode_tokens"] = _lengths(decode_tokens, "--decode-tokens")
    for name in ("densities", "retrieval"):
        given[name] = _numbers(given[name], f"--{name}", "numbers such as 25,50")
    given["kernels"] = tuple(word.strip() for word in kernels.split(",") if word.strip())

    from ..bench.gpu import bench
    from ..bench.gpu_settings import GpuSettings
    from ..bench.gpu_show import as_json, show

    settings = GpuSettings(**given)
    with _progress("gpu", settings, (*settings.tokens, *settings.decode_tokens)) as bar:
        data = as_json(settings, *bench(settings, bar.advance))
    outputs.write(json, None, data)
    show(console(), data)


def _bench(benchmark: str, given: dict[str, Any], what: dict[str, str | None] | None = None) -> None:
    """Run one benchmark, print its table, write JSON and picture; ``what``: arguments of its ``subject``."""
    json, png, tuned = (given.pop(name) for name in ("json", "png", "tuned_malloc"))
    settings = _settings(benchmark, given)
    outputs.check(json, png)
    if tuned:
        retune()
    import torch  # here, so that --help does not wait for it

    from ..bench.show import as_json, show

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    module = importlib.import_module(f"hf_longctx.bench.{benchmark}")
    subject = settings if what is None else module.subject(settings, **what)
    busy = Busy()
    with _progress(benchmark, settings, settings.tokens) as bar:
        results = module.run(subject, bar.advance)
    if what is None:
        data = as_json(benchmark, settings, results, busy.others())
    else:
        data = as_json(benchmark, subject.settings, results, busy.others(), module.facts(subject, results))
    outputs.write(json, png, data)  # before the table, which a closed pipe may cut off
    show(console(), data)


def _progress(benchmark: str, settings: Settings, lengths: tuple[int, ...]) -> Progress:
    """Of all rounds of all lengths; a round of more tokens weighs more."""
    each = len(settings.dtypes) * settings.rounds
    return Progress(f"bench {benchmark}", each * len(lengths), "rounds", weight=each * sum(lengths))


def _settings(benchmark: str, given: dict[str, Any]) -> Settings:
    """The settings that the options mean; an option that is None has its default."""
    given["dtypes"] = _words(given.pop("dtype"))
    given["tokens"] = _lengths(given["tokens"], "--tokens")
    if "densities" in given:
        given["densities"] = _numbers(given["densities"], "--densities", "percents such as 10,20,30")
        given["patterns"] = _words(given["patterns"])
    if given.get("layers", 0) is None:
        given["layers"] = default_layers(benchmark, given["tokens"])
    return Settings(**{name: value for name, value in given.items() if value is not None})


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _lengths(text: str, option: str) -> tuple[int, ...]:
    return tuple(parse_tokens(part, option) for part in _words(text))


def _numbers(text: str, option: str, example: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _words(text))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of {example}", param_hint=option) from None
